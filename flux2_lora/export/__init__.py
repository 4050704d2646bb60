"""One LoRA file that every client reads, and the proof that it does.

The default carries kohya's names for BFL's weights, with alpha equal to the rank of each matrix: the one form that
ComfyUI, Forge, Forge Neo, Diffusers and InvokeAI all load in full. `formats` has the forms, `clients` what each client
makes of a file, `proof` the comparison, `header` what the file says of itself.
"""

from flux2_lora.export.formats import FORMATS, modules_of
from flux2_lora.export.header import header
from flux2_lora.export.proof import Proof, table
from flux2_lora.export.write import export_lora, export_peft

__all__ = ["FORMATS", "Proof", "export_lora", "export_peft", "header", "modules_of", "table"]
