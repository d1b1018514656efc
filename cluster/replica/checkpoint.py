"""What is looked at in a checkpoint before any process of a gang is started."""

from cluster.replica.events import ReplicaPlan
from cluster.replica.model_source import ModelSource
from engine.config import LoadFormat
from engine.model_config import ModelConfig
from engine.weights.loader import verify_checkpoint


def check_checkpoint(plan: ReplicaPlan) -> None:
    """From the files' headers alone: every tensor of the model is there and has its shape. Raises CheckpointError."""
    if plan.load_format == LoadFormat.SAFETENSORS:
        directory = ModelSource(plan.model, plan.revision).directory()
        verify_checkpoint(directory, ModelConfig.from_directory(directory, plan.quantization))
