"""`python -m emlens`: the command line, where its script is not on the path."""

from emlens.cli.main import main

if __name__ == "__main__":
    main()
