"""The encoders (resnet.py); methods, whose forward is a step (method.py): mopro.py, baseline.py, classifier.py."""
