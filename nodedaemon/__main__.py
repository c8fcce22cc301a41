"""`python -m nodedaemon`, also installed as `puhui-nodedaemon`."""

from nodedaemon.cli import app


def main() -> None:
    """Runs the command line."""
    app()


if __name__ == "__main__":
    main()
