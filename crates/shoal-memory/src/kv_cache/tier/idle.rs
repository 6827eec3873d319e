//! What nobody has used for a while leaves the device, where a tier has it.
//!
//! Apart because nothing presses: without it all works, but whoever needs the memory later would wait for it. Conversations
//! are known by what was saved or found of them, the longest of each; their blocks go from the last one backwards, never one
//! that another sequence goes on from, none that somebody owns and none that a conversation in use begins with. What a tier
//! lacks is offered to it once more, and stays where it is if it does not take it.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use shoal_core::bytes::ByteCount;

use super::{Inner, Sequence};

/// Conversations that are remembered.
const CONVERSATIONS_MAX: usize = 4096;
/// Nothing is idle sooner: what a request has is looked at again after as long.
const IDLE_MIN: Duration = Duration::from_millis(10);

#[derive(Debug)]
struct Conversation {
    salt: Box<[u8]>,
    /// Of full blocks.
    tokens: Vec<u32>,
    used: Instant,
    /// What the tier lacks of it was offered again.
    is_offered: bool,
}

/// Conversations, the one first that was not used for longest.
#[derive(Debug, Default)]
pub(super) struct Conversations {
    known: VecDeque<Conversation>,
    tokens: usize,
}

impl Conversations {
    /// One was used, which may go on from one that is known.
    fn note(&mut self, salt: &[u8], tokens: &[u32], tokens_max: usize, is_offered: bool) {
        let goes_on = |known: &Conversation| *known.salt == *salt && tokens.starts_with(&known.tokens);
        if let Some(known) = self.known.iter().rposition(goes_on).and_then(|place| self.known.remove(place)) {
            self.tokens -= known.tokens.len();
        }
        self.tokens += tokens.len();
        let (salt, tokens) = (salt.into(), tokens.to_vec());
        self.known.push_back(Conversation { salt, tokens, used: Instant::now(), is_offered });
        while self.tokens > tokens_max || self.known.len() > CONVERSATIONS_MAX {
            let Some(oldest) = self.known.pop_front() else { break };
            self.tokens -= oldest.tokens.len();
        }
    }

    /// The one that was not used for longest, if that is so for `idle`.
    fn take_idle(&mut self, idle: Duration) -> Option<Conversation> {
        let oldest = self.known.pop_front_if(|oldest| oldest.used.elapsed() >= idle)?;
        self.tokens -= oldest.tokens.len();
        Some(oldest)
    }

    /// How many tokens of this one others that are known begin with.
    fn shared(&self, one: &Conversation) -> usize {
        let same = |other: &Conversation| {
            let pairs = one.tokens.iter().zip(&other.tokens);
            pairs.take_while(|(here, there)| here == there).count()
        };
        self.known.iter().filter(|other| other.salt == one.salt).map(same).max().unwrap_or(0)
    }
}

impl Inner {
    fn idle(&self) -> Option<Duration> {
        self.options.idle.map(|idle| idle.max(IDLE_MIN))
    }

    /// Remembers that a conversation is in use.
    pub(super) fn is_in_use(&self, sequence: &Sequence) {
        if self.options.idle.is_none() || sequence.is_again {
            return;
        }
        let Sequence { salt, tokens, .. } = sequence;
        self.conversations.lock().note(salt, tokens, self.options.queued_tokens_max, false);
    }

    /// How long it is until something may leave the device; none where that is now.
    pub(super) fn until_idle(&self, most: Duration) -> Option<Duration> {
        let Some(idle) = self.idle() else { return Some(most) };
        let conversations = self.conversations.lock();
        let left = conversations.known.front().map(|oldest| idle.saturating_sub(oldest.used.elapsed()));
        drop(conversations);
        left.map_or(Some(most), |left| (!left.is_zero()).then_some(left.min(most)))
    }

    /// Lets what was not used for long leave the device.
    pub(super) fn demote_idle(&self) {
        let Some(idle) = self.idle() else { return };
        let mut demoted = 0;
        while !self.is_over() {
            // Held for as long as nothing is copied or waited for.
            let mut conversations = self.conversations.lock();
            let Some(one) = conversations.take_idle(idle) else { break };
            let first = conversations.shared(&one) / self.block_tokens;
            drop(conversations);
            let keys = self.keys(&one.salt, &one.tokens);
            if keys.iter().all(|key| self.store.contains(key)) {
                match self.cache.demote(&one.salt, &one.tokens, first) {
                    Ok((blocks, is_held)) => {
                        demoted += u64::from(blocks);
                        if is_held {
                            // A request has it for longer than that: it is looked at again.
                            let Conversation { salt, tokens, is_offered, .. } = one;
                            let tokens_max = self.options.queued_tokens_max;
                            self.conversations.lock().note(&salt, &tokens, tokens_max, is_offered);
                        }
                    }
                    Err(error) => tracing::warn!(%error, "what is idle stays on the device"),
                }
            } else if !one.is_offered {
                self.offer_again(one);
            }
        }
        if demoted == 0 {
            return;
        }
        self.count(|counts| counts.demoted += demoted);
        let freed = self.cache.trim(ByteCount(u64::MAX));
        match &freed {
            Ok(report) => {
                tracing::debug!(demoted, freed = %report.freed, "KV that nobody used left the device");
            }
            // It is the first to go when somebody needs memory.
            Err(error) => tracing::debug!(demoted, %error, "KV left the device, its memory stays for now"),
        }
    }

    fn offer_again(&self, one: Conversation) {
        let tokens_max = self.options.queued_tokens_max;
        self.conversations.lock().note(&one.salt, &one.tokens, tokens_max, true);
        let mut queue = self.queue.lock();
        if queue.tokens + one.tokens.len() > tokens_max {
            return;
        }
        queue.tokens += one.tokens.len();
        let Conversation { salt, tokens, .. } = one;
        let discards = queue.discards;
        queue.waiting.push_back(Sequence { salt, tokens, first: 0, discards, is_again: true });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn conversations_go_on_and_the_oldest_are_forgotten() {
        let mut known = Conversations::default();
        known.note(b"a", &[1, 2], 10, false);
        known.note(b"b", &[1, 2], 10, false);
        known.note(b"a", &[1, 2, 3], 10, false);
        known.note(b"a", &[1, 2, 4, 5], 10, true);
        assert_eq!((known.known.len(), known.tokens), (3, 9));
        let one = known.take_idle(Duration::ZERO).expect("all are");
        assert_eq!((&*one.salt, &one.tokens[..]), (&b"b"[..], &[1, 2][..]));
        assert_eq!(known.shared(&one), 0, "another tenant's");
        let one = known.take_idle(Duration::ZERO).expect("all are");
        assert_eq!((one.tokens.len(), known.shared(&one)), (3, 2));
        assert!(known.take_idle(Duration::from_hours(1)).is_none());
        known.note(b"a", &[9; 8], 10, false);
        assert_eq!((known.known.len(), known.tokens), (1, 8), "12 tokens are too many");
    }
}
