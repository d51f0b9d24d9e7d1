"""The tests compute on the CPU, also where there is a GPU, so that they find the same numbers
everywhere. test_train.py's last test is for the GPU: it gets the environment back as it was."""
import os

AS_STARTED = dict(os.environ)
os.environ["CUDA_VISIBLE_DEVICES"] = ""
