"""Settings shipped with the package: `--preset NAME`."""
