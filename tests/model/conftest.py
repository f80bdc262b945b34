"""A tiny model of each family, for tests of the decoder and of layer dropout."""

import pytest
from helpers.tiny import EVERY_FAMILY, make_tiny


@pytest.fixture(params=EVERY_FAMILY)
def any_family(request):
    return make_tiny(request.param)
