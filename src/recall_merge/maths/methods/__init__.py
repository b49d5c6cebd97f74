"""Merge methods: pure functions (base, deltas, weights, *, options) -> merged tensor, found by name in `METHODS`."""

from recall_merge.maths.methods import aligned as aligned
from recall_merge.maths.methods import averages as averages
from recall_merge.maths.methods import families as families
from recall_merge.maths.methods import informed as informed
from recall_merge.maths.methods import joint as joint
from recall_merge.maths.methods import recall as recall
from recall_merge.maths.methods import spectral as spectral
from recall_merge.maths.methods import sphere as sphere
from recall_merge.maths.methods.aliases import ALIASES as ALIASES
from recall_merge.maths.methods.aliases import Alias as Alias
from recall_merge.maths.methods.registry import METHODS as METHODS
from recall_merge.maths.methods.registry import Draws as Draws
from recall_merge.maths.methods.registry import Method as Method
from recall_merge.maths.methods.registry import method as method
