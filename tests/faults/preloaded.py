"""What a trainer imports, for the process that trainers are forked from. It starts no thread and computes nothing."""

import deepspeed  # noqa: F401
import matplotlib.pyplot  # noqa: F401
import torch.utils.tensorboard  # noqa: F401
import transformers.models.qwen2_vl.modeling_qwen2_vl  # noqa: F401
from tqdm import tqdm

import vtfast.trainer  # noqa: F401

tqdm.get_lock()  # a semaphore, made once: each killed fork that made its own would leave it behind
