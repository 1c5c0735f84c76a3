"""ReGLA as Hugging Face models. Importing this package makes the model type "regla" known to the Auto classes."""

from regla.models.cache import fork_cache
from regla.models.configuration import ReGLAConfig
from regla.models.heads import ReGLAForQuestionAnswering, ReGLAForSequenceClassification, ReGLAForTokenClassification
from regla.models.modeling import ReGLAForCausalLM, ReGLAModel, ReGLAPreTrainedModel
from regla.models.registration import register
from regla.models.states import SavedState, load_state, save_state, stack_states

__all__ = [
    "ReGLAConfig",
    "ReGLAForCausalLM",
    "ReGLAForQuestionAnswering",
    "ReGLAForSequenceClassification",
    "ReGLAForTokenClassification",
    "ReGLAModel",
    "ReGLAPreTrainedModel",
    "SavedState",
    "fork_cache",
    "load_state",
    "register",
    "save_state",
    "stack_states",
]

register()
