"""`python -m lobra_jax`: the same as the command `lobra`."""

from lobra_jax.cli import main

if __name__ == "__main__":
    main()
