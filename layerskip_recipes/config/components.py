"""Components: config sections with a `_component_`, torchtune's way to name a callable and its arguments."""

import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any, ClassVar

from omegaconf import OmegaConf
from pydantic import GetCoreSchemaHandler, GetJsonSchemaHandler
from pydantic_core import CoreSchema, core_schema

from layerskip_recipes.config.schema import check, nearest
from layerskip_recipes.errors import ConfigError

BUILD_ERRORS = (TypeError, ValueError, OSError, RuntimeError, AssertionError, ArithmeticError, LookupError, ImportError)
KNOWN_PACKAGES = ("torch.", "torchtune.", "torchao.", "bitsandbytes.", "layerskip_recipes.")


class Component:
    """The dotted path of a callable and the arguments that the config gives it.

    `key` is the section's key in its config, for error messages. `RecipeConfig.load` sets it.
    """

    ALLOWED: ClassVar[tuple[str, str]] = ("a section with _component_: dotted.path", "{_component_: dotted.path}")

    def __init__(self, section: Mapping[str, Any], key: str = "") -> None:
        self.section, self.key = dict(section), key
        self.given: Sequence[str] = ()
        self.positional = 0
        self.path: str = self.section["_component_"]
        self.arguments = {name: value for name, value in self.section.items() if name != "_component_"}

    @classmethod
    def of_argument(cls, value: Any, key: str) -> "Component":
        """The component that an argument names by its dotted path, or by a section as in YAML; checked."""
        section = {"_component_": value} if isinstance(value, str) else value
        check(key, section, cls)
        component = cls(section, key)
        component.check()
        return component

    def __repr__(self) -> str:
        return repr(self.section)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Component) and self.section == other.section

    def get(self, argument: str, default: Any = None) -> Any:
        return self.arguments.get(argument, default)

    @cached_property
    def target(self) -> Callable:
        component = find_component(self.path, self.key)
        if not callable(component):
            raise ConfigError(f"{self.key}._component_: {self.path!r} is a {type(component).__name__}, not a callable")
        return component

    @property
    def builder(self) -> "Component":
        """The component that builds the model: the section `base` of `layerskip_decoder`, or this one."""
        base = self.get("base")
        return Component(base, f"{self.key}.base") if isinstance(base, Mapping) and "_component_" in base else self

    def takes(self, argument: str) -> bool:
        return argument in (parameter_names(self.path) or ())

    def replace(self, **arguments: Any) -> "Component":
        """The same callable with new values for these arguments."""
        other = Component(self.section | arguments, self.key)
        other.given, other.positional = self.given, self.positional
        return other

    def check(self) -> None:
        """Raises a ConfigError that lists all mismatches with the callable's signature."""
        target = self.target
        try:
            parameters = inspect.signature(target).parameters
        except (TypeError, ValueError):  # a C function may have no signature
            return
        names = [n for n, p in parameters.items() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
        known = {*self.arguments, *self.given}
        mistakes: list[str] = []
        if not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
            for name in (name for name in self.arguments if name not in names):
                mistakes.append(f"{self.key}.{name}: {self.path} takes no such argument. {nearest(str(name), names)}")
            for name in (name for name in self.given if name not in names):
                mistakes.append(f"{self.key}._component_: {self.path!r} cannot be used here, it takes no {name}")
        for name in names[self.positional :]:
            if parameters[name].default is inspect.Parameter.empty and name not in known:
                example = f"{self.key or '{key}'}.{name}=..."
                mistakes.append(f"{self.key}.{name}: missing; {self.path} needs it, for example {example}")
        if mistakes:
            raise ConfigError(*mistakes)

    def build(self, *args: Any, **kwargs: Any) -> Any:
        """Call it with the config's arguments and these additional ones."""
        from torchtune.config import instantiate
        from torchtune.config._errors import InstantiationError

        try:
            return instantiate(OmegaConf.create(self.section), *args, **kwargs)
        except ConfigError as e:
            raise type(e)(*map(self._by_key, e.args)) from e
        except (*BUILD_ERRORS, InstantiationError) as e:
            if not self.path.startswith(KNOWN_PACKAGES) and not isinstance(e, InstantiationError):
                raise  # the traceback points into the user's own code
            arguments = ", ".join(f"{name}={value}" for name, value in self.arguments.items())
            raise ConfigError(f"{self.key}: {self.path}({arguments}) cannot be built: {e!r}") from e

    def _by_key(self, message: str) -> str:
        """The callable's message "path: ..." with the config's full key, such as "model.path: ..."."""
        for name in self.arguments:
            if message.startswith((f"{name}:", f"{name}.")):
                return re.sub(rf"(?<![\w.]){name}(?=[:.=])", f"{self.key}.{name}", message)
        return message if message.startswith(self.key) else f"{self.key}: {message}"

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_plain_validator_function(
            cls._validate, serialization=core_schema.plain_serializer_function_ser_schema(lambda value: value.section)
        )

    @classmethod
    def _validate(cls, value: Any) -> "Component":
        if isinstance(value, Component):
            return value
        if not isinstance(value, Mapping) or not isinstance(value.get("_component_"), str):
            words, _ = cls.ALLOWED
            raise ConfigError(f": {value!r} is not allowed. Allowed: {words}")
        return cls(value)

    @classmethod
    def __get_pydantic_json_schema__(cls, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        path = {"type": "string", "description": "The dotted path of a class or function."}
        return {"type": "object", "properties": {"_component_": path}, "required": ["_component_"]}


class Takes:
    """Annotation of a `Component`: check its arguments, plus the keyword and positional arguments the recipe adds."""

    def __init__(self, *names: str, positional: int = 0) -> None:
        self.given, self.positional = names, positional

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        def validate(value: Component) -> Component:
            value.given, value.positional = self.given, self.positional
            value.check()  # without a key: pydantic's error has it
            return value

        return core_schema.no_info_after_validator_function(validate, handler(source))


def parameter_names(path: Any) -> set[str] | None:
    """The parameter names of a component; None if unknown (`Component.check` then says why)."""
    try:
        parameters = inspect.signature(find_component(path)).parameters.values()
    except (ValueError, TypeError):
        return None
    return {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}


def find_component(path: Any, key: str = "") -> Any:
    # Importing torchtune takes seconds, and `layerskip cat` rarely needs it.
    from torchtune.config._errors import InstantiationError
    from torchtune.config._utils import _get_component_from_path

    try:
        return _get_component_from_path(path)
    except (InstantiationError, ValueError, AttributeError) as e:
        raise ConfigError(f"{key}._component_: {path!r} cannot be imported ({str(e).splitlines()[-1]})") from e
