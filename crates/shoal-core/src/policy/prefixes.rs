//! Prefixes and the weights of the model that they are of, in one currency.

use super::tests::{MIB, evicted, model, reasons, shelf, wake};
use super::*;

/// An idle model's own prefixes go before its weights, so its bytes are worth what the two are together, and the sentence
/// says that: by its weights alone it would name a price that nobody chose it by.
#[test]
fn weights_that_prefixes_go_before_are_priced_with_them() {
    let mut chat = ModelState { last_used_ms: 9_000, ..model(1, "chat", 20, 20) };
    (chat.kv_held, chat.kv_cached) = (MIB(20), MIB(20));
    (chat.kv_back_us_per_mib, chat.kv_found_milli) = (9_900, 500);
    let pick_of = |needed, other_us| {
        let other =
            ModelState { last_used_ms: 9_000, restore_us_per_mib: other_us, ..model(2, "other", 20, 20) };
        let state =
            shelf(60, vec![model(0, "new", needed, 0), chat.clone(), other], vec![wake(0, needed, 9_500)]);
        let said = plan(&state, 10_000);
        (evicted(&said), reasons(&said))
    };
    let pick = |other_us| pick_of(10, other_us);
    // 100 us a MiB of the weights and 4,950 of the prefixes (half of 9,900): 2,525 together, in two seconds.
    let (said, why) = pick(2_000);
    assert_eq!(said, [(2, 10)], "by its weights alone chat would be the cheaper one: {why}");
    let (said, why) = pick(3_000);
    assert_eq!(said, [(1, 10)], "{why}");
    let sentence = "chat holds 20 MiB of KV for prompts that may come again, worth least (1262 us a second for each MiB of that \
                    and of its weights, 100 us to bring these back: 9900 us to bring it back, a use finds 50.0% of it again, \
                    1.0 uses in 2.0 s)";
    assert!(why.contains(sentence), "{why}");
    // Beyond the prefixes it is the same price, and the sentence is the same.
    let (said, beyond) = pick_of(30, 3_000);
    assert_eq!(said, [(1, 30)], "{beyond}");
    assert!(beyond.contains(sentence), "{beyond}");
    // Asleep, it has nothing beside them.
    let asleep = ModelState { weights_held: MIB(0), ..chat.clone() };
    let state = shelf(20, vec![model(0, "new", 10, 0), asleep], vec![wake(0, 10, 9_500)]);
    let why = reasons(&plan(&state, 10_000));
    assert!(
        why.contains("worth least (2475 us a second for each MiB: 9900 us to bring it back, a use finds"),
        "{why}"
    );
}
