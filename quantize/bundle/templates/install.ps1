# Installs PediatricsGPT from this folder, with no network. Double-click install.bat, or:
#   powershell -ExecutionPolicy Bypass -File install.ps1
# ASCII only: PowerShell 5 reads scripts in the code page of the system.
$here = Split-Path -Parent $MyInvocation.MyCommand.Path
$candidates = @(@CANDIDATES@)
foreach ($candidate in $candidates) {
    $command = $candidate[0]
    $version = @($candidate | Select-Object -Skip 1)
    if (-not (Get-Command $command -ErrorAction SilentlyContinue)) { continue }
    & $command @version -c 'import sys; sys.exit(not @CONDITION@)' 2>$null
    if ($LASTEXITCODE -ne 0) { continue }
    # The installer checks every file, this one too; what checks must itself be whole before it runs.
    $digest = (Get-FileHash -Algorithm SHA256 -LiteralPath "$here\installer.py").Hash.ToLower()
    $sums = Get-Content -Encoding UTF8 -LiteralPath "$here\SHA256SUMS"
    if ($sums -notcontains "$digest  installer.py") {
        Write-Host 'installer.py or SHA256SUMS is damaged. Nothing was installed; copy the bundle again.'
        exit 2
    }
    & $command @version -I -B "$here\installer.py" @args
    exit $LASTEXITCODE
}
Write-Host 'No suitable Python was found (needed: @PYTHONS@, 64 bit).'
Write-Host 'Install it with the Windows installer from python.org, copied to the stick by whoever has a network.'
exit 2
