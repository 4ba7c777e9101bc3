"""`python -m lenet_fast` is `lenet-fast`."""

from .cli import main

if __name__ == "__main__":
    main()
