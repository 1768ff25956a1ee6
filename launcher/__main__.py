"""``python -m launcher``: the same as the command ``launch``."""

from launcher.cli import main

main()
