"""What gradients do on their way through time: how large they are at every step, and what one step does to them.

Imported explicitly; ``import seqcore`` does not. docs/diagnostics.md shows both by example.
"""

from .flow import Flow, GradientFlow
from .gradients import gradient_flow
from .jacobians import StepJacobians, step_jacobians

__all__ = ["Flow", "GradientFlow", "StepJacobians", "gradient_flow", "step_jacobians"]
