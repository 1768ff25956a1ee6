"""``python -m launcher``: the same as the command ``launch``."""

from launcher.cli.main import main

main()
