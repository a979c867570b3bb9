"""`python -m c2v_rag.cli`"""

from c2v_rag.cli import main

if __name__ == "__main__":
    main()
