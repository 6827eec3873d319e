//! Fuzzing with any compiler: seeds, and what random changes make of them, for as long as `SHOAL_FUZZ_SECONDS` says
//! (each target; one second by default). No coverage guides it, so it finds less than libFuzzer does in the same time;
//! it keeps every target compiling and every seed passing.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::time::{Duration, Instant};

use super::{TARGETS, Target};

const INPUT_BYTES_MAX: usize = 4096;
const CHANGES_MAX: usize = 6;
/// What parsers look for, so that changes meet it now and then.
const WORDS: [&[u8]; 24] = [
    b"\0",
    b"\n",
    b"\r\n",
    b"\"",
    b"\\u0000",
    b"\\",
    b"{",
    b"}",
    b"[",
    b"]",
    b"[[",
    b":",
    b",",
    b"=",
    b"'",
    b"#",
    b"-1",
    b"0",
    b"1e999",
    b"18446744073709551615",
    b"null",
    b"true",
    b"MiB",
    b"\xff\xfe",
];

/// Numbers that are the same in every run (xorshift).
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    /// Below `end`, which is not zero.
    fn below(&mut self, end: usize) -> usize {
        usize::try_from(self.next() % end as u64).unwrap_or(0)
    }

    fn range(&mut self, length: usize) -> std::ops::Range<usize> {
        let start = self.below(length + 1);
        start..start + self.below(length - start + 1).min(64)
    }
}

fn changed(seeds: &[Vec<u8>], random: &mut Random) -> Vec<u8> {
    let mut data = seeds[random.below(seeds.len())].clone();
    for _ in 0..=random.below(CHANGES_MAX) {
        let at = random.below(data.len() + 1);
        match random.below(7) {
            0 if !data.is_empty() => {
                let at = at.min(data.len() - 1);
                data[at] ^= 1 << random.below(8);
            }
            1 if !data.is_empty() => {
                let at = at.min(data.len() - 1);
                data[at] = u8::try_from(random.below(256)).unwrap_or(0);
            }
            2 => {
                let gone = random.range(data.len());
                data.drain(gone);
            }
            3 => {
                let again = data[random.range(data.len())].to_vec();
                data.splice(at..at, again);
            }
            4 => {
                let word = WORDS[random.below(WORDS.len())];
                data.splice(at..at, word.iter().copied());
            }
            5 => {
                let other = &seeds[random.below(seeds.len())];
                let piece = other[random.range(other.len())].to_vec();
                let gone = random.range(data.len());
                data.splice(gone, piece);
            }
            _ => data.truncate(at),
        }
    }
    data.truncate(INPUT_BYTES_MAX);
    data
}

fn seeds(name: &str) -> Vec<Vec<u8>> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fuzz/seeds").join(name);
    let entries = std::fs::read_dir(&folder).unwrap_or_else(|error| panic!("{}: {error}", folder.display()));
    let mut files: Vec<_> = entries.map(|entry| entry.expect("listed").path()).collect();
    files.sort();
    files.iter().map(|file| std::fs::read(file).expect("a seed")).collect()
}

fn run(name: &str, target: Target) -> u64 {
    let seconds = std::env::var("SHOAL_FUZZ_SECONDS").ok().and_then(|text| text.parse().ok()).unwrap_or(1.0);
    let seeds = seeds(name);
    assert!(!seeds.is_empty(), "{name} has no seeds");
    let survives = |data: &[u8]| {
        assert!(
            catch_unwind(AssertUnwindSafe(|| target(data))).is_ok(),
            "{name} does not survive this; keep it in fuzz/seeds/{name}: \"{}\"",
            data.escape_ascii()
        );
    };
    survives(b"");
    for seed in &seeds {
        survives(seed);
    }
    let mut random = Random(0x9e37_79b9_7f4a_7c15);
    let (end, mut inputs) = (Instant::now() + Duration::from_secs_f64(seconds), 0);
    while Instant::now() < end {
        for _ in 0..16 {
            survives(&changed(&seeds, &mut random));
            inputs += 1;
        }
    }
    inputs
}

#[test]
fn every_parser_survives_its_seeds_and_what_grows_from_them() {
    let runs = TARGETS.map(|(name, target)| (name, std::thread::spawn(move || run(name, target))));
    for (name, thread) in runs {
        let inputs = thread.join().unwrap_or_else(|_| panic!("{name}: see above"));
        assert!(inputs >= 16, "{name} was given only {inputs} inputs");
    }
}

#[test]
fn every_target_is_one_of_libfuzzer_s_too() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fuzz");
    let names = |folder: &Path| {
        let entries =
            std::fs::read_dir(folder).unwrap_or_else(|error| panic!("{}: {error}", folder.display()));
        let mut names: Vec<String> = entries
            .map(|entry| entry.expect("listed").path())
            .filter_map(|path| Some(path.file_stem()?.to_string_lossy().into_owned()))
            .collect();
        names.sort();
        names
    };
    let expected: Vec<String> = TARGETS.iter().map(|(name, _)| (*name).to_owned()).collect();
    assert_eq!(names(&folder.join("seeds")), expected);
    assert_eq!(names(&folder.join("fuzz_targets")), expected);
}

#[test]
fn a_target_that_panics_is_told_with_its_input() {
    let outcome = catch_unwind(|| run("sizes", |data| assert!(!data.starts_with(b"5"), "five")));
    let why = outcome.expect_err("the seeds have one that begins with 5");
    let why = why.downcast_ref::<String>().expect("words");
    assert!(why.contains("keep it in fuzz/seeds/sizes: \"5"), "{why}");
}
