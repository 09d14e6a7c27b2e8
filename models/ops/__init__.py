"""Operations with one signature and a file per backend."""

from models.ops import attention, attention_cpu

ATTENTION: dict[str, attention.Attention] = {
    "reference": attention.reference,
    "cpu": attention_cpu.attention,
}
