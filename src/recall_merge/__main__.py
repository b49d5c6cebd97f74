"""`python -m recall_merge` is `recall`."""

from recall_merge.cli.app import main

if __name__ == "__main__":
    main()
