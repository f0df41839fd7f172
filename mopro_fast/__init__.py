"""mopro_fast: fast, trustworthy training of MoPro (Li, Xiong, Hoi, ICLR 2021) on noisy web images.

``from mopro_fast import ops`` gives the fused operations, ``mopro-fast --help`` the command line.
Importing this package alone imports neither torch nor the compiled extension.
"""

__version__ = "0.1.0"
