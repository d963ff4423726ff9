"""The text of ``network.h``."""

from cbpq.exports.c import text
from cbpq.exports.c.floats import FloatArithmetic
from cbpq.exports.c.source import Written
from cbpq.inputs import InputSpec


def header(spec: InputSpec, classes: int, written: Written, arithmetic: FloatArithmetic) -> str:
    """How to call the network, and what it takes."""
    about = (
        "An image classifier whose constrained weights are packed integer codes, written by cbpq. No input is "
        "multiplied by a constrained weight: inputs are added or subtracted, once for each power of two in a weight, "
        "sums are doubled, and each output gets one scale and one bias, BatchNorm included. Nothing is allocated. "
        "Calls share static memory, so only one may run at a time. For one picture: "
        f"{written.additions} additions in constrained layers, {written.products} products in layers that stayed "
        f"float. Constants take {written.constant_bytes} bytes, working memory {written.memory_bytes} bytes."
    )
    mean, std = (", ".join(text.number(value) for value in values) for values in (spec.mean, spec.std))
    lines = [
        text.paragraph(about) + "#ifndef CBPQ_NETWORK_H",
        "#define CBPQ_NETWORK_H",
        "#include <stdint.h>\n",
        f"#define CBPQ_CHANNELS {spec.channels}",
        f"#define CBPQ_HEIGHT {spec.height}",
        f"#define CBPQ_WIDTH {spec.width}",
        "#define CBPQ_INPUT_SIZE (CBPQ_CHANNELS * CBPQ_HEIGHT * CBPQ_WIDTH)",
        f"#define CBPQ_CLASSES {classes}",
        f"#define CBPQ_CONSTANT_BYTES {written.constant_bytes}",
        f"#define CBPQ_MEMORY_BYTES {written.memory_bytes}\n",
        "/* Of each channel: a pixel of 0 to 255 becomes (pixel / 255 - mean) / std. */",
        f"#define CBPQ_MEAN {{{mean}}}",
        f"#define CBPQ_STD {{{std}}}\n",
        '#ifdef __cplusplus\nextern "C" {\n#endif\n',
        arithmetic.declarations(),
        "#ifdef __cplusplus\n}\n#endif\n",
        "#endif",
    ]
    return "\n".join(lines) + "\n"
