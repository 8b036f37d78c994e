"""What a user can mend."""


class UserError(ValueError):
    """A mistake in the input: its message names the thing, the place and the way out; entry points show it bare."""
