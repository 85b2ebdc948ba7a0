"""The routing explorer: where each token of a text goes, as plain data (`routing_trace`) and to look at (`view`)."""
from minimoe.explore.specialisation import (
    Specialisation,
    mutual_information,
    permutation_null,
    specialisation,
    specialisation_difference,
    token_identity_router,
)
from minimoe.explore.text import labels
from minimoe.explore.trace import LayerTrace, RoutingTrace, routing_trace
from minimoe.explore.view import RoutingView, view

__all__ = ["LayerTrace", "RoutingTrace", "RoutingView", "Specialisation", "labels", "mutual_information",
           "permutation_null", "routing_trace", "specialisation", "specialisation_difference", "token_identity_router", "view"]
