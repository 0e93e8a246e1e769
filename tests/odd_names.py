"""Names of folders and files that something on the way may take for more than a name."""

ODD_NAMES = (
    *("a[1]", "[ab]", "what?", "x*", "**", "{a,b}", "!a"),  # patterns
    *("a::b", "memory::a", "a:b", "file:a"),  # chains of drivers, schemes
    *("~", "~root", "$HOME", "#1", "a#2", "a;b", "a@b", "a=b"),
    *("50%", "a%20b", "a+b", " blanks on both sides ", "a&b<c>", "é 🎈", "a'b\"c"),
)


def pattern_twins(name: str) -> tuple[str, ...]:
    """Names that ``name`` would match as a pattern, or stand for as anything but itself."""
    twins = {
        "a[1]": ("a1",),
        "[ab]": ("a", "b"),
        "what?": ("whats",),
        "x*": ("x", "xyz"),
        "**": ("any",),
        "{a,b}": ("a", "b"),
        "a%20b": ("a b",),
        "a+b": ("a b",),
        "a#2": ("a",),
    }
    return twins.get(name, ())
