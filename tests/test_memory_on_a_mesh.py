"""What programs take on the devices of a mesh, as the compiler tells it."""

import json
import os
import subprocess
import sys

# A model whose parameters are much larger than its activations, on eight devices.
SCRIPT = """
import json
import jax
jax.config.update("jax_num_cpu_devices", 8)
from t5x_lite import setup
from t5x_lite.models import t5
from t5x_lite.models.config import T5Config
from t5x_lite.optimizers import OptimizerConfig
from t5x_lite.run_config import DataConfig, TrainConfig
from t5x_lite.step import LossConfig

model = T5Config(
    vocab_size=64, d_model=256, d_ff=1024, d_kv=64, num_heads=4, num_encoder_layers=6,
    num_decoder_layers=6,
)
data = DataConfig("unused", {"inputs": 8, "targets": 8}, batch_size=8)
config = TrainConfig(
    "unused", model, OptimizerConfig(), LossConfig(), data, 1, mesh={"fsdp": 8}
)
programs = setup.make_programs(config, compile_train_step=False)
key = jax.eval_shape(lambda: jax.random.key(0))
init = programs.init.lower(key).compile().memory_analysis()
step = programs.train_step.lower(programs.abstract_state, setup.batch_shapes(config), key)
print(json.dumps({
    "parameters": 4 * t5.num_parameters(model),
    "init": [init.output_size_in_bytes, init.temp_size_in_bytes],
    "step": step.compile().memory_analysis().temp_size_in_bytes,
}))
"""


def test_no_device_holds_the_whole():
    """The state is made in parts, and the backward pass keeps no gathered parameters."""
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)
    whole, (made, beside) = found["parameters"], found["init"]
    # An eighth of the parameters and of Adafactor's statistics; and of what is being drawn.
    assert whole / 8 < made < 1.1 * whole / 8
    assert beside < whole / 4
    # Gradients, updates and so on, an eighth of each. Parameters that were kept would be a whole.
    assert found["step"] < whole
