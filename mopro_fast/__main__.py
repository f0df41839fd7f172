"""``python -m mopro_fast …`` is ``mopro-fast …``, so that ``torchrun -m mopro_fast train …`` works."""

from mopro_fast.cli import main

if __name__ == "__main__":
    main()
