//! Object stores that speak S3: one request an object, signed.
//!
//! Apart because it is one protocol: HTTP/1.1 with signature version 4, four methods, no listing and no parts, because a
//! block is a few MiB at most. Plain HTTP only: what leaves the machine goes through a proxy that speaks TLS, as the
//! server's own address does. What the store answers is believed no more for being signed: see [`super::envelope`].

use std::fmt;
use std::fmt::Write as _;
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use hmac::{Hmac, KeyInit, Mac};
use sha2::{Digest, Sha256};

use super::envelope::HEAD_BYTES;
use super::wire::{Link, Wire, WireError, told};

/// Of what a store says of an error so much is read.
const ERROR_MAX: u64 = 16 << 10;
/// Headers of an answer.
const HEADERS_MAX: usize = 64;

/// Where a bucket is.
#[derive(Clone)]
pub struct S3Spec {
    /// `host:port`, reached by plain HTTP.
    pub address: String,
    /// The bucket, asked for by path.
    pub bucket: String,
    /// What names in it begin with; letters, digits and `-_./`.
    pub prefix: String,
    /// The region that is signed for.
    pub region: String,
    /// The key's public part.
    pub access_key: String,
    /// The key's secret part.
    pub secret_key: String,
}

impl fmt::Debug for S3Spec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut out = f.debug_struct("S3Spec");
        out.field("address", &self.address).field("bucket", &self.bucket).field("prefix", &self.prefix);
        out.finish_non_exhaustive()
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::with_capacity(2 * bytes.len()), |mut text, byte| {
        // Writing to a string cannot fail.
        let _ = write!(text, "{byte:02x}");
        text
    })
}

fn hmac(key: &[u8], what: &str) -> Vec<u8> {
    // Keys of any length do.
    let Ok(mut code) = Hmac::<Sha256>::new_from_slice(key) else { return Vec::new() };
    code.update(what.as_bytes());
    code.finalize().into_bytes().to_vec()
}

/// `20130524T000000Z`, of seconds since 1970 (the calendar's arithmetic after H. Hinnant, "chrono-compatible low-level date
/// algorithms").
fn timestamp(seconds: u64) -> String {
    let (days, second) = (seconds / 86_400, seconds % 86_400);
    let shifted = days + 719_468;
    let (era, of_era) = (shifted / 146_097, shifted % 146_097);
    let year_of_era = (of_era - of_era / 1460 + of_era / 36_524 - of_era / 146_096) / 365;
    let of_year = of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month_from_march = (5 * of_year + 2) / 153;
    let day = of_year - (153 * month_from_march + 2) / 5 + 1;
    let month = if month_from_march < 10 { month_from_march + 3 } else { month_from_march - 9 };
    let year = year_of_era + era * 400 + u64::from(month <= 2);
    format!("{year:04}{month:02}{day:02}T{:02}{:02}{:02}Z", second / 3600, second / 60 % 60, second % 60)
}

impl S3Spec {
    /// The value of `Authorization`. `headers` are in the order of their names, which are small.
    fn sign(
        &self,
        method: &str,
        path: &str,
        headers: &[(&str, &str)],
        body_hash: &str,
        time: &str,
    ) -> String {
        let names = headers.iter().map(|(name, _)| *name).collect::<Vec<_>>().join(";");
        let listed =
            headers.iter().map(|(name, value)| format!("{name}:{value}\n")).collect::<Vec<_>>().concat();
        let request = format!("{method}\n{path}\n\n{listed}\n{names}\n{body_hash}");
        let day = time.get(..8).unwrap_or_default();
        let scope = format!("{day}/{}/s3/aws4_request", self.region);
        let to_sign =
            format!("AWS4-HMAC-SHA256\n{time}\n{scope}\n{}", hex(&Sha256::digest(request.as_bytes())));
        let key = hmac(format!("AWS4{}", self.secret_key).as_bytes(), day);
        let key = hmac(&hmac(&hmac(&key, &self.region), "s3"), "aws4_request");
        format!(
            "AWS4-HMAC-SHA256 Credential={}/{scope},SignedHeaders={names},Signature={}",
            self.access_key,
            hex(&hmac(&key, &to_sign))
        )
    }
}

#[derive(Debug)]
struct Answer {
    status: u16,
    /// Bytes that follow, where the answer says so.
    bytes: Option<u64>,
    is_kept: bool,
}

/// See the module.
pub(super) struct S3 {
    spec: S3Spec,
    link: Option<Link>,
}

impl S3 {
    pub(super) fn new(spec: S3Spec) -> Self {
        Self { spec, link: None }
    }

    /// Sends a request on a connection that may be new, and reads the head of its answer.
    fn request(
        &mut self,
        method: &str,
        name: &str,
        body: [&[u8]; 2],
        until: Instant,
    ) -> Result<(Link, Answer), WireError> {
        let spec = &self.spec;
        let path = format!("/{}/{}{name}", spec.bucket, spec.prefix);
        let body_hash = {
            let mut hasher = Sha256::new();
            hasher.update(body[0]);
            hasher.update(body[1]);
            hex(&hasher.finalize())
        };
        let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
        let time = timestamp(now);
        let headers =
            [("host", spec.address.as_str()), ("x-amz-content-sha256", &body_hash), ("x-amz-date", &time)];
        let signature = spec.sign(method, &path, &headers, &body_hash, &time);
        let said = format!(
            "{method} {path} HTTP/1.1\r\nhost: {}\r\nx-amz-content-sha256: {body_hash}\r\nx-amz-date: {time}\r\n\
             authorization: {signature}\r\ncontent-length: {}\r\n\r\n",
            spec.address,
            body[0].len() + body[1].len()
        );
        let parts = [said.as_bytes(), body[0], body[1]];
        if let Some(mut link) = self.link.take().filter(Link::is_fresh) {
            // One that was kept may have been closed meanwhile: then it is as if there had been none.
            match ask(&mut link, &parts, until) {
                Err(WireError::Passing(_)) => {}
                other => return other.map(|answer| (link, answer)),
            }
        }
        let mut link = Link::connect(&spec.address, until)?;
        let answer = ask(&mut link, &parts, until)?;
        Ok((link, answer))
    }

    /// Reads what follows, so that the connection can be used again.
    fn finish(&mut self, mut link: Link, answer: &Answer, until: Instant) -> Result<(), WireError> {
        match answer.bytes {
            Some(bytes) if answer.is_kept && bytes <= ERROR_MAX => {
                link.skip(bytes, until)?;
                self.link = Some(link);
            }
            // Its end is not known: nothing more is asked here.
            _ => {}
        }
        Ok(())
    }

    /// What an answer that is no success means: none where there is no such object.
    fn refused(
        &mut self,
        mut link: Link,
        answer: &Answer,
        has_body: bool,
        until: Instant,
    ) -> Result<(), WireError> {
        let mut said = String::new();
        if let Some(bytes) = answer.bytes.filter(|bytes| has_body && *bytes <= ERROR_MAX) {
            let mut body = vec![0; usize::try_from(bytes).unwrap_or(0)];
            link.read_exact(&mut body, until)?;
            said = String::from_utf8_lossy(&body).into_owned();
            if answer.is_kept {
                self.link = Some(link);
            }
        } else if !has_body && answer.is_kept {
            self.link = Some(link);
        }
        meaning(answer.status, &said)
    }
}

/// What an answer means that is no success; nothing where there is no such object.
fn meaning(status: u16, said: &str) -> Result<(), WireError> {
    let between = |open: &str, close: &str| {
        let start = said.find(open)? + open.len();
        said.get(start..start + said.get(start..)?.find(close)?)
    };
    let code = told(between("<Code>", "</Code>").unwrap_or_default());
    let reason = format!("the object store answers {status} {code}").trim_end().to_owned();
    match status {
        404 if code != "NoSuchBucket" => Ok(()),
        408 | 429 | 500.. => Err(WireError::Passing(reason)),
        _ => Err(WireError::Refused(reason)),
    }
}

fn ask(link: &mut Link, parts: &[&[u8]], until: Instant) -> Result<Answer, WireError> {
    link.send(parts, until)?;
    loop {
        let answer = understand(&link.read_through(b"\r\n\r\n", until)?)?;
        // What goes before an answer is none.
        if !(100..200).contains(&answer.status) {
            return Ok(answer);
        }
    }
}

/// The head of an answer, up to the empty line.
fn understand(head: &[u8]) -> Result<Answer, WireError> {
    let mut headers = [httparse::EMPTY_HEADER; HEADERS_MAX];
    let mut answer = httparse::Response::new(&mut headers);
    let parsed =
        answer.parse(head).map_err(|error| WireError::Passing(format!("no answer of HTTP: {error}")))?;
    let status = answer.code.filter(|_| parsed.is_complete());
    let status = status.ok_or_else(|| WireError::Passing("half an answer of HTTP".to_owned()))?;
    let values = |wanted: &'static str| {
        answer
            .headers
            .iter()
            .filter(move |header| header.name.eq_ignore_ascii_case(wanted))
            .map(|header| std::str::from_utf8(header.value).unwrap_or("no text").trim())
    };
    let is_kept =
        answer.version == Some(1) && !values("connection").any(|value| value.eq_ignore_ascii_case("close"));
    let mut lengths = values("content-length");
    let bytes = match lengths.next() {
        // Of several lengths nobody knows which one is meant.
        Some(text)
            if text.bytes().all(|byte| byte.is_ascii_digit()) && lengths.all(|other| other == text) =>
        {
            text.parse().ok()
        }
        None if status == 204 => Some(0),
        _ => None,
    };
    let bytes = bytes.filter(|_| values("transfer-encoding").next().is_none());
    Ok(Answer { status, bytes, is_kept })
}

impl Wire for S3 {
    fn get(
        &mut self,
        name: &str,
        head: &mut [u8; HEAD_BYTES],
        body: &mut [u8],
        until: Instant,
    ) -> Result<Option<u64>, WireError> {
        let (mut link, answer) = self.request("GET", name, [&[], &[]], until)?;
        if answer.status != 200 {
            return self.refused(link, &answer, true, until).map(|()| None);
        }
        let bytes =
            answer.bytes.ok_or_else(|| WireError::Passing("an object without a length".to_owned()))?;
        link.read_object(bytes, head, body, until)?;
        if answer.is_kept {
            self.link = Some(link);
        }
        Ok(Some(bytes))
    }

    fn put(
        &mut self,
        name: &str,
        head: &[u8; HEAD_BYTES],
        body: &[u8],
        until: Instant,
    ) -> Result<(), WireError> {
        let (link, answer) = self.request("PUT", name, [head, body], until)?;
        if answer.status == 200 || answer.status == 201 {
            return self.finish(link, &answer, until);
        }
        let status = answer.status;
        self.refused(link, &answer, true, until)?;
        Err(WireError::Refused(format!("the object store answers a write with {status}")))
    }

    fn has(&mut self, name: &str, until: Instant) -> Result<bool, WireError> {
        let (link, answer) = self.request("HEAD", name, [&[], &[]], until)?;
        if answer.status == 200 {
            // The length is the object's; none of it follows.
            if answer.is_kept {
                self.link = Some(link);
            }
            return Ok(true);
        }
        self.refused(link, &answer, false, until).map(|()| false)
    }

    fn delete(&mut self, name: &str, until: Instant) -> Result<(), WireError> {
        let (link, answer) = self.request("DELETE", name, [&[], &[]], until)?;
        match answer.status {
            200 | 204 => self.finish(link, &answer, until),
            _ => self.refused(link, &answer, true, until),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn the_signature_is_the_one_that_is_documented() {
        // The example of "Authenticating Requests: Using the Authorization Header" in the S3 API reference.
        let spec = S3Spec {
            address: "examplebucket.s3.amazonaws.com".to_owned(),
            bucket: "examplebucket".to_owned(),
            prefix: String::new(),
            region: "us-east-1".to_owned(),
            access_key: "AKIAIOSFODNN7EXAMPLE".to_owned(),
            secret_key: "wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY".to_owned(),
        };
        let nothing = hex(&Sha256::digest(b""));
        let time = timestamp(1_369_353_600);
        assert_eq!(time, "20130524T000000Z");
        let headers = [
            ("host", spec.address.as_str()),
            ("range", "bytes=0-9"),
            ("x-amz-content-sha256", &nothing),
            ("x-amz-date", &time),
        ];
        assert_eq!(
            spec.sign("GET", "/test.txt", &headers, &nothing, &time),
            "AWS4-HMAC-SHA256 Credential=AKIAIOSFODNN7EXAMPLE/20130524/us-east-1/s3/aws4_request,\
             SignedHeaders=host;range;x-amz-content-sha256;x-amz-date,\
             Signature=f0e8bdb87c964420e857bd35b5d6ed310bd44f0170aba48dd91039c6036bdb41"
        );
        assert!(!format!("{spec:?}").contains("EXAMPLEKEY"));
    }

    #[test]
    fn a_length_is_the_one_that_is_meant() {
        let bytes = |headers: &str| {
            understand(format!("HTTP/1.1 200 OK\r\n{headers}\r\n").as_bytes()).expect("an answer").bytes
        };
        assert_eq!(bytes("content-length: 7\r\nContent-Length: 7\r\n"), Some(7));
        for strange in [
            "content-length: 7\r\ncontent-length: 8\r\n",
            "content-length: +7\r\n",
            "content-length: 7, 7\r\n",
            "content-length: 99999999999999999999\r\n",
            "content-length: 7\r\ntransfer-encoding: chunked\r\n",
            "content-length:\r\n",
            "",
        ] {
            assert_eq!(bytes(strange), None, "{strange}");
        }
    }

    #[test]
    fn the_key_of_a_signature_is_the_one_that_is_documented() {
        // "Deriving the signing key", an example of the API's reference: 20150830, us-east-1, iam.
        let key = hmac(b"AWS4wJalrXUtnFEMI/K7MDENG+bPxRfiCYEXAMPLEKEY", "20150830");
        let key = hmac(&hmac(&hmac(&key, "us-east-1"), "iam"), "aws4_request");
        assert_eq!(hex(&key), "c4afb1cc5771d871763a393e44b703571b55cc28424d1a5e86da6ed3c154a4b9");
    }

    proptest! {
        #[test]
        fn any_answer_is_understood_or_refused(
            noise in proptest::collection::vec(any::<u8>(), 0..300),
            status in 0..1000_u16,
            text in ".{0,300}",
        ) {
            let _ = understand(&noise);
            let whole = [b"HTTP/1.1 200 OK\r\ncontent-length: ", noise.as_slice(), b"\r\n\r\n"].concat();
            if let Ok(answer) = understand(&whole) {
                prop_assert!(answer.bytes.is_none() || noise.iter().any(u8::is_ascii_digit));
            }
            for said in [text.clone(), format!("<Code>{text}</Code>"), format!("</Code>{text}<Code>")] {
                if let Err(error) = meaning(status, &said) {
                    let told = error.to_string();
                    prop_assert!(told.chars().count() < 300 && !told.contains(char::is_control), "{:?}", told);
                }
            }
        }
    }

    #[test]
    fn days_are_those_of_the_calendar() {
        for (seconds, text) in [
            (0, "19700101T000000Z"),
            (951_782_399, "20000228T235959Z"),
            (951_782_400, "20000229T000000Z"),
            (1_709_164_800, "20240229T000000Z"),
            (1_735_689_599, "20241231T235959Z"),
            (4_107_542_400, "21000301T000000Z"),
        ] {
            assert_eq!(timestamp(seconds), text);
        }
    }
}
