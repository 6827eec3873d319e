//! The keys that clients may show, and what they are called.
//!
//! A key is known to everybody else by its name only: in the queue, in figures, in the log. One without a name is called by
//! its place in the file (`key 2`), which tells nothing about it. Two keys of one name are one client, so that a key can be
//! replaced while both are good.

use std::path::{Path, PathBuf};

use crate::shelf::Caller;

const KEY_BYTES_MIN: usize = 16;
const NAME_BYTES_MAX: usize = 64;

/// The keys that clients may show.
#[derive(Clone)]
pub struct Keys {
    keys: Vec<(Caller, String)>,
    /// The file can be read by other users of this machine.
    pub readable_by_others: bool,
}

impl std::fmt::Debug for Keys {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.keys.len() {
            1 => f.write_str("1 key"),
            count => write!(f, "{count} keys"),
        }
    }
}

/// Why there are no keys.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum KeyError {
    /// The file cannot be read.
    #[error("api_key_file {}: {source}", file.display())]
    Unreadable {
        /// The file.
        file: PathBuf,
        /// Why not.
        source: std::io::Error,
    },
    /// Without a key nobody could come in, or everybody.
    #[error("api_key_file {} holds no key: write one a line, at least {KEY_BYTES_MIN} characters long", file.display())]
    Empty {
        /// The file.
        file: PathBuf,
    },
    /// Short keys can be guessed.
    #[error("api_key_file {} line {line}: a key needs at least {KEY_BYTES_MIN} visible ASCII characters", file.display())]
    Weak {
        /// The file.
        file: PathBuf,
        /// From 1.
        line: usize,
    },
    /// What stands before the key is no name, or something stands behind it.
    #[error(
        "api_key_file {} line {line}: write KEY or NAME KEY; a name is 1 to {NAME_BYTES_MAX} letters, digits, '.', '_', \
         '-', '@'",
        file.display()
    )]
    Name {
        /// The file.
        file: PathBuf,
        /// From 1.
        line: usize,
    },
}

impl Keys {
    /// Reads a file with one key a line, each with a name before it or without; empty lines and lines that begin with
    /// `#` are skipped.
    ///
    /// # Errors
    /// [`KeyError`] if it cannot be read, holds none, or holds one too short or with a bad name.
    pub fn read(file: &Path) -> Result<Self, KeyError> {
        use std::os::unix::fs::MetadataExt;
        let unreadable = |source| KeyError::Unreadable { file: file.to_owned(), source };
        let text = std::fs::read_to_string(file).map_err(unreadable)?;
        let mode = std::fs::metadata(file).map_err(unreadable)?.mode();
        Ok(Self { readable_by_others: mode & 0o077 != 0, ..Self::parse(&text, file)? })
    }

    /// The keys in a text that was read from `file`.
    pub(crate) fn parse(text: &str, file: &Path) -> Result<Self, KeyError> {
        let mut read: Vec<(String, &str)> = Vec::new();
        for (index, line) in text.lines().enumerate() {
            let line = line.trim();
            if line.is_empty() || line.starts_with('#') {
                continue;
            }
            let number = index + 1;
            let mut words = line.split_ascii_whitespace();
            let (name, key) = match (words.next(), words.next(), words.next()) {
                (Some(key), None, None) => (format!("key {}", read.len() + 1), key),
                (Some(name), Some(key), None) if is_name(name) => (name.to_owned(), key),
                _ => return Err(KeyError::Name { file: file.to_owned(), line: number }),
            };
            if key.len() < KEY_BYTES_MIN || !key.bytes().all(|byte| byte.is_ascii_graphic()) {
                return Err(KeyError::Weak { file: file.to_owned(), line: number });
            }
            read.push((name, key));
        }
        let Some((first, _)) = read.first() else { return Err(KeyError::Empty { file: file.to_owned() }) };
        let has_rivals = read.iter().any(|(name, _)| name != first);
        let keys = read.iter().map(|(name, key)| (Caller::new(name, has_rivals), (*key).to_owned()));
        Ok(Self { keys: keys.collect(), readable_by_others: false })
    }

    /// Whose key this is. Compares with every key, in a time that tells nothing about them but how many there are, how
    /// long the shown one is and which of them it was.
    pub(super) fn find(&self, shown: &str) -> Option<&Caller> {
        let mut found = None;
        for (caller, key) in &self.keys {
            if same(key.as_bytes(), shown.as_bytes()) {
                found = Some(caller);
            }
        }
        found
    }

    /// What the keys are called, each name once, in the file's order.
    #[must_use]
    pub fn names(&self) -> Vec<&str> {
        let mut names: Vec<&str> = Vec::new();
        for name in self.keys.iter().filter_map(|(caller, _)| caller.name()) {
            if !names.contains(&name) {
                names.push(name);
            }
        }
        names
    }
}

fn is_name(text: &str) -> bool {
    let good = |byte: u8| byte.is_ascii_alphanumeric() || b"._-@".contains(&byte);
    (1..=NAME_BYTES_MAX).contains(&text.len()) && text.bytes().all(good)
}

fn same(key: &[u8], shown: &[u8]) -> bool {
    let mut difference = u8::from(key.len() != shown.len());
    for (index, byte) in shown.iter().enumerate() {
        difference |= std::hint::black_box(byte ^ key[index % key.len()]);
    }
    std::hint::black_box(difference) == 0
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<Keys, KeyError> {
        Keys::parse(text, Path::new("keys"))
    }

    #[test]
    fn keys_are_read_and_compared_whole() {
        let file = tempfile::NamedTempFile::new().expect("a file");
        let read = |text: &str| {
            std::fs::write(file.path(), text).expect("written");
            Keys::read(file.path())
        };
        let keys = read("# ours\n\n0123456789abcdef\n  fedcba9876543210 \n").expect("two");
        assert!(keys.find("0123456789abcdef").is_some() && keys.find("fedcba9876543210").is_some());
        for wrong in
            ["", "0", "0123456789abcde", "0123456789abcdef0", "0123456789abcdef0123456789abcdef", "# ours"]
        {
            assert!(keys.find(wrong).is_none(), "{wrong}");
        }
        assert_eq!(format!("{keys:?}"), "2 keys", "keys are never printed");
        assert!(matches!(read("# none\n"), Err(KeyError::Empty { .. })));
        assert!(matches!(read("\nshort\n"), Err(KeyError::Weak { line: 2, .. })));
        assert!(matches!(Keys::read(Path::new("/nowhere/keys")), Err(KeyError::Unreadable { .. })));
    }

    #[test]
    fn keys_have_names_and_two_of_one_name_are_one_client() {
        let keys =
            parse("alice 0123456789abcdef\nfedcba9876543210\nalice\t00000000aaaaaaaa\n").expect("three");
        let name = |key: &str| keys.find(key).and_then(Caller::name).map(str::to_owned);
        assert_eq!(name("0123456789abcdef").as_deref(), Some("alice"));
        assert_eq!(keys.find("0123456789abcdef"), keys.find("00000000aaaaaaaa"));
        assert_eq!(
            name("fedcba9876543210").as_deref(),
            Some("key 2"),
            "by its place, which tells nothing of it"
        );
        assert_eq!(keys.names(), ["alice", "key 2"]);
        assert!(keys.find("0123456789abcdef").is_some_and(Caller::has_rivals));
        let alone = parse("a 0123456789abcdef\na 00000000aaaaaaaa").expect("two keys of one client");
        assert!(!alone.find("0123456789abcdef").is_some_and(Caller::has_rivals));
        let long = "n".repeat(65);
        for wrong in ["a:b 0123456789abcdef", "a 0123456789abcdef # his", &format!("{long} 0123456789abcdef")]
        {
            assert!(matches!(parse(wrong), Err(KeyError::Name { line: 1, .. })), "{wrong}");
        }
        assert!(matches!(parse("alice short"), Err(KeyError::Weak { line: 1, .. })));
    }
}
