//! Words of others, before they are kept or shown: workers' and policies' own, and what programs print.
//!
//! Apart because whoever writes them decides neither how long they are nor what is in them, and thousands of such sentences
//! are kept, shown in terminals, logged and sent.

/// The beginning of `words`, `chars_max` characters at most, with `...` where there was more. What is not for the eye (line
/// ends, escape sequences' first bytes) becomes a space.
pub(crate) fn bounded(words: &str, chars_max: usize) -> String {
    let shown = |c: char| if c.is_control() { ' ' } else { c };
    let words = words.trim_matches(|c: char| c.is_whitespace() || c.is_control());
    let mut kept: String = words.chars().take(chars_max).map(shown).collect();
    if words.chars().nth(chars_max).is_some() {
        kept.push_str("...");
    }
    kept
}

#[cfg(test)]
mod tests {
    use super::bounded;

    #[test]
    fn the_beginning_without_what_a_terminal_would_obey() {
        assert_eq!(bounded(" two words\n", 9), "two words");
        assert_eq!(bounded("two words", 8), "two word...");
        assert_eq!(bounded("a\u{1b}[31mb\r\nc\u{9b}d", 100), "a [31mb  c d");
        assert_eq!(bounded("\u{1b}[0mdone", 100), "[0mdone");
        assert_eq!(bounded("\u{e4}\u{f6}\u{fc}", 2), "\u{e4}\u{f6}...", "characters, not bytes");
        assert_eq!(bounded("\0\n", 5), "");
    }
}
