"""Mixture of experts: a router chooses experts for each token; a shared expert, where there is one, sees every token.

T tokens, H hidden size.
"""

import torch
from torch import nn

from engine.layers.experts import Experts
from engine.layers.feed_forward import GatedFeedForward
from engine.layers.router import Router
from engine.parallel.collectives import Collectives
from engine.parallel.token_dispatch import ReplicatedDispatch, TokenDispatch
