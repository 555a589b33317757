"""What a trainer imports, for the process that trainers are forked from. It starts no thread and computes nothing."""

import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401 (brings torch's compiler along, whatever the optimizer)
import matplotlib.pyplot  # noqa: F401
import torch.utils.tensorboard  # noqa: F401
import transformers.models.qwen2_vl.modeling_qwen2_vl  # noqa: F401
from tqdm import tqdm

import vtfast.trainer  # noqa: F401

tqdm.get_lock()  # a semaphore, made once: each killed fork that made its own would leave it behind
