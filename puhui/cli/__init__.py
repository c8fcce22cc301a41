"""The command line: `puhui`."""
