"""`python -m hyperjax` is the command `hyperjax`."""

from hyperjax.launch.main import main

if __name__ == "__main__":
    main()
