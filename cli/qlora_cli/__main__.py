"""``python -m qlora_cli``, where the script is not on PATH."""

from qlora_cli.main import app

app(prog_name="qlora")
