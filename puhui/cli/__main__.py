"""`python -m puhui.cli`, also installed as `puhui`."""

from puhui.cli import main

if __name__ == "__main__":
    main()
