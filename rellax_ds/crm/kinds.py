"""Which network `crm.kind` names: the one list of recommenders."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rellax_ds.crm.autoint import AutoInt
from rellax_ds.crm.caser import Caser
from rellax_ds.crm.dcnv2 import DCNv2
from rellax_ds.crm.deepfm import DeepFM
from rellax_ds.crm.dien import DIEN
from rellax_ds.crm.din import DIN
from rellax_ds.crm.gru4rec import GRU4Rec
from rellax_ds.crm.sasrec import SASRec
from rellax_ds.crm.sim import SIM
from rellax_ds.errors import ArtifactError

if TYPE_CHECKING:
    from rellax_ds.config import CRMKind
    from rellax_ds.crm.network import Architecture, Recommender

KINDS: dict[CRMKind, type[Recommender]] = {
    "din": DIN,
    "sim": DIN,  # on the histories that stage 3 retrieved
    "sim_full": SIM,
    "dien": DIEN,
    "sasrec": SASRec,
    "gru4rec": GRU4Rec,
    "caser": Caser,
    "deepfm": DeepFM,
    "dcnv2": DCNv2,
    "autoint": AutoInt,
}


def build(architecture: Architecture) -> Recommender:
    """The network of an architecture, with initial weights from torch's random state.

    Raises:
        ArtifactError: There is no such kind: the architecture was saved by another version.
    """
    if architecture.kind not in KINDS:
        raise ArtifactError(
            f"crm.kind '{architecture.kind}' is none of {', '.join(KINDS)}; rerun `rellax crm`"
        )
    return KINDS[architecture.kind](architecture)
