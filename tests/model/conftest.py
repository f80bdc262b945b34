"""A tiny model of each family, for tests of the decoder and of layer dropout."""

import pytest
from helpers.tiny import FAMILIES, make_tiny


@pytest.fixture(params=FAMILIES)
def any_family(request):
    return make_tiny(request.param)
