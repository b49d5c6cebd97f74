"""`python -m recall_merge` is `recall`."""

from recall_merge.commands.app import main

if __name__ == "__main__":
    main()
