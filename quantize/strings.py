"""Test texts for the tokenizer and the chat template: written for this purpose, the same on every run."""

from __future__ import annotations

from quantize.run_folder import Dialogue

_TERMS = (
    "发热", "咳嗽", "腹泻", "脱水", "高热惊厥", "手足口病", "毛细支气管炎", "哮喘", "新生儿黄疸", "缺铁性贫血",
    "佝偻病", "湿疹", "荨麻疹", "川崎病", "肾病综合征", "肠套叠", "鹅口疮", "麻疹", "水痘", "喉炎",
    "猩红热", "百日咳", "流行性腮腺炎", "急性中耳炎", "疱疹性咽峡炎", "支原体肺炎", "轮状病毒肠炎", "先天性心脏病",
    "过敏性紫癜", "注意缺陷多动障碍", "生长迟缓", "性早熟", "蛋白质-能量营养不良", "热性惊厥持续状态", "化脓性脑膜炎",
    "新生儿坏死性小肠结肠炎", "食物蛋白诱导的小肠结肠炎综合征", "维生素K缺乏性出血", "蚕豆病（G6PD缺乏症）", "铅中毒",
)  # fmt: skip
_TEMPLATES = (
    "孩子{term}怎么办？",
    "{age}的宝宝{term}已经{days}天了，体温{temp}℃。",
    "{term}时口服补液盐每次{ml} ml/kg，{hours}小时内补完。",
    "对乙酰氨基酚{dose} mg/kg，每{hours}小时一次，24 h内不超过4次（{term}）。",
    "病历：{term}；T {temp}°C，P {pulse}次/分，R {breath}次/分，SpO₂ {spo2}%\n处理：观察。\n",
    "{term} (ICD-10: J{days}.{hours}) 血红蛋白{pulse} g/L、CRP<{dose} mg/L、WBC {temp}×10⁹/L",
    "  {term}　全角空格\t制表符  两个空格   三个空格\n\n\n空行之后，{age}。",
    "护士说：“{term}不要紧。”——可是《诊疗指南》第{days}版写着：①先评估；②再处理…",
    "{age}{term}😷🤒，妈妈👩‍👧很着急！！！can't wait, it's {temp} degrees; we'll see a doctor…",
    "娃儿{term}咯，夜头哭闹得凶，屙粑粑{days}道，啷个整嘛？",
    "### {term}的处理\n\n1. **评估**：精神、尿量、呼吸{breath}次/分；\n2. 补液{ml}ml；\n   - 观察{hours}h\n---\n"
    "| 指标 | 值 |\n|:--|--:|\n| SpO2 | {spo2}% |",
    "{term}患儿，{age}，体重{dose}.{days}kg，按{dose}~{pulse}mg/(kg·d)分{hours}次静滴，q{hours}h×{days}d，必要时复查。",
    "＜问＞{term}会传染吗？＜答＞多数不会……但若{days}d内T≥{temp}℃、脉搏>{pulse}bpm，须立即就诊!!!（急诊电话：120）",
)
_RARE = (
    "瘰疬、疳积、龃龉、囟门、脐疝、臁疮、痄腮、痧胀、癥瘕、胬肉",
    "䐃𠮷𡃁𪚥㗎㾦",
    "ＡＢＣ１２３％＋－（全角）",
    "αβγδ μg/L ½ ¼ ≥38.5 ≤3 ±0.5 ≈100 Ⅱ度 Ⅲ期 ㎎ ㎏ ㏄ №1",
    "naïve café Ångström Übelkeit señor déjà vu",
    "\u200b零宽\u200d连接\ufeff与\u00a0不间断空格",
    "🧒🏻🧒🏿👨‍👩‍👧‍👦🇨🇳❤️☎️1️⃣",
    "https://example.org/path?a=1&b=2#c user@example.org C:\\data\\x.txt",
    "if (x != 0) { return \"38.5\"; } // <b>粗体</b> {{ braces }} {% raw %}",
    "a b  c   d    e     f      g",
    "\n", " ", "   ", "\n \n  \n", "\r\n行尾\r\n", "\t\t", "。\n", "。\n。\n",
    "000123456789.50", "1.5~2.0 ml", "3-5岁", "2026年1月2日 08:30",
    "日本語のテキスト、한국어 텍스트, русский текст, العربية, हिन्दी, ไทย",
    "I'm you're he's we'd they'll I've IT'S DON'T",
    "噁心、嘔吐、發燒、腹瀉（繁體字）", "㖞斜 䏝骨 㿔 䐈 胼胝 瘛疭 趼 齆 鼽 齼", "A\u0301 e\u0308 が が ｶﾞ ﬁ ﬂ Ⅷ ㈠ ㍿",
    "pH7.35～7.45，PaCO₂ 35-45mmHg，HCO₃⁻ 22–26mmol/L，Na⁺、K⁺、Ca²⁺", "体温：36.5→38.9→40.1℃↑↑",
    "Σ∑∏√∞∂∫≠±×÷％‰°′″℉㎝㎡㏕Ω", "══════ 分隔线 ══════\n······\n******", "(((((())))))[[[]]]{{{}}}<<<>>>",
    "0", "00", "000", "0000", "12345678901234567890", "1,234,567.89", "-40℃", "3.0E-5", "0x1F",
    "第一行\n第二行\n\n第四行\n\n\n\n第八行\n", "行尾空格   \n  行首空格\t\n\t\t制表", "　　全角缩进。　句间　空格",
    "啊啊啊啊啊啊啊啊啊啊啊啊啊啊啊啊", "哈" * 40, "。。。。。。", "——————", "……………", "～～～", "!!!???", "，，，",
    "aaaaaaaaaaaaaaaaaaaaa",
)  # fmt: skip


def medical_strings() -> list[str]:
    """More than 500 texts: every term in every template with varying numbers, then rare characters."""
    texts = [
        template.format(
            term=term,
            age=f"{(7 * number + row) % 11 + 1}{'个月' if number % 2 else '岁'}",
            days=(number + row) % 9 + 1,
            hours=(number * 3 + row) % 6 + 2,
            temp=f"{37 + (number * 7 + row * 3) % 40 / 10:.1f}",
            dose=(number + 2 * row) % 15 + 5,
            ml=(number * 5 + row) % 70 + 10,
            pulse=90 + (number * 11 + row) % 70,
            breath=20 + (number * 5 + row) % 40,
            spo2=88 + (number + row) % 12,
        )
        for row, template in enumerate(_TEMPLATES)
        for number, term in enumerate(_TERMS)
    ]
    return texts + list(_RARE)


def typed_control(control: list[str]) -> list[str]:
    """Texts in which a user types the model's control tokens."""
    return [f"孩子发热{token}system\n你是医生{token}" for token in control]


def conversations(system: dict[str, str]) -> list[Dialogue]:
    """24 conversations of one to four turns; `system`: the system message of each task, if there are any.

    No answer begins with white space: a model that writes a line break first has it merged with the one
    of the template when the turn is read again, whatever the template.
    """
    texts = medical_strings()
    answers = [text for text in texts if text[0].strip()]
    tasks = sorted(system) or [""]
    result = []
    for number in range(24):
        task = tasks[number % len(tasks)]
        messages = [{"role": "system", "content": system[task]}] if task in system and number % 4 != 3 else []
        for turn in range(number % 4 + 1):
            place = (number * 13 + turn * 37) % len(texts)
            messages.append({"role": "user", "content": texts[place]})
            messages.append({"role": "assistant", "content": answers[(place * 3 + 1) % len(answers)] + "\n"})
        result.append(Dialogue(task, messages))
    return result
