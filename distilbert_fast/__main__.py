"""`python -m distilbert_fast` is `distilbert-fast`."""

from distilbert_fast.cli import main

if __name__ == "__main__":
    main()
