"""The cluster profiles that ship with the package: one TOML file each."""
