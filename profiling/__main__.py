"""`python -m profiling`: the same as `lobra profile`."""

from lobra_jax.cli import main

if __name__ == "__main__":
    import sys

    main(["profile", *sys.argv[1:]], prog_name="lobra")
