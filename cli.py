"""The command line from a checkout; the installed script `abhiapi` runs the same."""

from abhiapi.commands import main

if __name__ == "__main__":
    main(prog_name="abhiapi")
