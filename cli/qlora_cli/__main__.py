"""``python -m qlora_cli``, where the script is not on PATH."""

from qlora_cli.app import app

app(prog_name="qlora")
