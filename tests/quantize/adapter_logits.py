"""Child process: logits of a GGUF with a GGUF LoRA adapter on top, as llama.cpp computes them.

python adapter_logits.py MODEL ADAPTER OUTPUT.npy TOKEN…
"""

from __future__ import annotations

import ctypes
import sys
from typing import Any

import llama_cpp
import numpy as np

api: Any = llama_cpp
_, model_file, adapter_file, output, *tokens = sys.argv
api.llama_backend_init()
model = api.llama_model_load_from_file(model_file.encode(), api.llama_model_default_params())
parameters = api.llama_context_default_params()
parameters.n_ctx = parameters.n_batch = parameters.n_ubatch = len(tokens)
parameters.n_threads = parameters.n_threads_batch = 1
parameters.type_k = parameters.type_v = 0  # GGML_TYPE_F32
parameters.flash_attn_type = 0
context = api.llama_init_from_model(model, parameters)
adapter = api.llama_adapter_lora_init(model, adapter_file.encode())
assert adapter, "llama.cpp refuses the adapter"
pointers = (api.llama_adapter_lora_p_ctypes * 1)(adapter)
assert api.llama_set_adapters_lora(context, pointers, 1, (ctypes.c_float * 1)(1.0)) == 0
batch = api.llama_batch_init(len(tokens), 0, 1)
batch.n_tokens = len(tokens)
for position, token in enumerate(tokens):
    batch.token[position] = int(token)
    batch.pos[position] = position
    batch.n_seq_id[position] = 1
    batch.seq_id[position][0] = 0
    batch.logits[position] = 1
assert api.llama_decode(context, batch) == 0
size = api.llama_vocab_n_tokens(api.llama_model_get_vocab(model))
np.save(output, np.ctypeslib.as_array(api.llama_get_logits(context), shape=(len(tokens), size)))
