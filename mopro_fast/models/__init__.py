"""The encoders (resnet.py), the MoPro step (mopro.py), the baseline's (baseline.py), a config's model (build.py)."""
