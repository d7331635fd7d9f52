"""FreezeInitializers: initializers that are also graph inputs become constants.

Below IR version 4 every initializer is listed as an input and is constant by rule (onnx/docs/IR.md); a packed
weight could not fold there, so such models move to IR 4, where the listing means "can be fed", and it goes.
"""

from __future__ import annotations

import onnx_ir as ir


class FreezeInitializers(ir.passes.InPlacePass):
    """Drop initializers from the graph inputs: always below IR 4, from there on only where told.

    Parameters
    ----------
    fed_too : bool
        Also freeze those that a caller may feed (IR version 4 and above).
    """

    def __init__(self, *, fed_too: bool = False) -> None:
        super().__init__()
        self._fed_too = fed_too

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Return whether an input was dropped or the IR version raised."""
        old = model.ir_version < 4
        if not old and not self._fed_too:
            return ir.passes.PassResult(model, modified=False)
        held = set(model.graph.initializers.values())
        kept = [value for value in model.graph.inputs if value not in held]
        modified = old or len(kept) != len(model.graph.inputs)
        model.graph.inputs[:] = kept
        if old:
            model.ir_version = 4
        return ir.passes.PassResult(model, modified=modified)
