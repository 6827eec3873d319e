//! Who may ask: the gate that every request passes before anything else looks at it.
//!
//! A server on loopback is reachable by every web page that its user opens, so the Host header is checked always (against
//! names rebound to loopback), the Origin header on everything that is not a mere read, and orders must be
//! `application/json`, which a foreign page cannot send without being asked first. Beyond loopback a key is required too.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use axum::extract::{Request, State};
use axum::http::{HeaderMap, HeaderName, HeaderValue, StatusCode, header, uri::Authority};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};

use super::App;
use super::error::ApiError;
use super::keys::Keys;
use crate::config::ServerConfig;
use crate::shelf::Caller;

/// What the gate knows.
#[derive(Debug)]
pub(crate) struct Guard {
    listen: SocketAddr,
    hosts: Vec<String>,
    keys: Option<Keys>,
}

impl Guard {
    pub(crate) fn new(config: &ServerConfig, keys: Option<Keys>) -> Self {
        let hosts = config.allowed_hosts.iter().map(|host| host.to_ascii_lowercase()).collect();
        Self { listen: config.listen, hosts, keys }
    }

    /// Names: loopback's and the configured ones. Addresses: loopback's, and any where we listen beyond loopback, since
    /// no name can be rebound to a literal address.
    fn knows_host(&self, host: &str) -> bool {
        let name = host.trim_end_matches('.').to_ascii_lowercase();
        if name == "localhost" || self.hosts.contains(&name) {
            return true;
        }
        let literal = name.trim_start_matches('[').trim_end_matches(']').parse::<IpAddr>();
        literal.is_ok_and(|ip| {
            let ip = ip.to_canonical();
            ip.is_loopback() || ip == self.listen.ip() || !self.listen.ip().to_canonical().is_loopback()
        })
    }

    fn check_host(&self, headers: &HeaderMap, target: Option<&Authority>) -> Result<(), ApiError> {
        let refuse = |host: &str| {
            let message = format!(
                "this server is not called {host:?}; call it by its address, or list the name in allowed_hosts under [server]"
            );
            ApiError::new(StatusCode::FORBIDDEN, "host_not_allowed", message)
        };
        let mut hosts = headers.get_all(header::HOST).iter();
        let host = hosts.next().and_then(|host| host.to_str().ok()).unwrap_or_default();
        if hosts.next().is_some() {
            return Err(refuse("two names"));
        }
        let authority = host.parse::<Authority>().map_err(|_| refuse(host))?;
        if !self.knows_host(authority.host()) {
            return Err(refuse(authority.host()));
        }
        match target {
            Some(target) if !self.knows_host(target.host()) => Err(refuse(target.host())),
            _ => Ok(()),
        }
    }

    fn check_origin(headers: &HeaderMap) -> Result<(), ApiError> {
        let text = |name: HeaderName| headers.get(name).map(|value| value.to_str().unwrap_or("?"));
        let foreign = |who: &str| {
            let message = format!("a page of {who} may not ask this of the server");
            Err(ApiError::new(StatusCode::FORBIDDEN, "origin_not_allowed", message))
        };
        if let Some(origin) = text(header::ORIGIN) {
            let host = text(header::HOST).unwrap_or_default();
            let own = ["http://", "https://"].iter().any(|scheme| {
                origin.strip_prefix(scheme).is_some_and(|origin| origin.eq_ignore_ascii_case(host))
            });
            if !own {
                return foreign(origin);
            }
        } else if let Some(site) = text(HeaderName::from_static("sec-fetch-site"))
            && !matches!(site, "same-origin" | "none")
        {
            return foreign("another site");
        }
        Ok(())
    }

    fn check_key(&self, headers: &HeaderMap) -> Result<Caller, ApiError> {
        let Some(keys) = &self.keys else { return Ok(Caller::default()) };
        let shown = headers.get(header::AUTHORIZATION).and_then(|value| value.to_str().ok());
        let shown = shown.and_then(|value| value.split_once(' '));
        let shown =
            shown.filter(|(scheme, _)| scheme.eq_ignore_ascii_case("bearer")).map(|(_, key)| key.trim());
        match shown {
            Some(shown) => keys.find(shown).cloned().ok_or_else(|| {
                let message = "that API key is not known here";
                ApiError::new(StatusCode::UNAUTHORIZED, "invalid_api_key", message)
            }),
            None => Err(ApiError::new(
                StatusCode::UNAUTHORIZED,
                "missing_api_key",
                "this server wants an API key: Authorization: Bearer KEY",
            )),
        }
    }

    /// Lets a request in, and says whose it is.
    pub(crate) fn check(&self, request: &Request) -> Result<Caller, ApiError> {
        let (headers, path) = (request.headers(), request.uri().path());
        self.check_host(headers, request.uri().authority())?;
        let changes = !request.method().is_safe();
        if changes {
            Self::check_origin(headers)?;
        }
        let caller = if is_under(path, "/v1") || is_under(path, "/api") || path == "/metrics" {
            self.check_key(headers)?
        } else {
            Caller::default()
        };
        if changes && is_under(path, "/api") && !is_json(headers) {
            let message = "send this with Content-Type: application/json";
            return Err(ApiError::new(StatusCode::UNSUPPORTED_MEDIA_TYPE, "not_json", message));
        }
        Ok(caller)
    }
}

fn is_under(path: &str, root: &str) -> bool {
    path.strip_prefix(root).is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
}

fn is_json(headers: &HeaderMap) -> bool {
    let value = headers.get(header::CONTENT_TYPE).and_then(|value| value.to_str().ok()).unwrap_or_default();
    value.split(';').next().unwrap_or_default().trim().eq_ignore_ascii_case("application/json")
}

/// The gate, and the headers that every response carries.
pub(crate) async fn check(State(app): State<Arc<App>>, mut request: Request, next: Next) -> Response {
    let mut response = match app.guard.check(&request) {
        Ok(caller) => {
            request.extensions_mut().insert(caller);
            next.run(request).await
        }
        Err(error) => {
            let unauthorised = error.status == StatusCode::UNAUTHORIZED;
            let mut response = error.into_response();
            if unauthorised {
                let value = HeaderValue::from_static("Bearer realm=\"shoal\"");
                response.headers_mut().insert(header::WWW_AUTHENTICATE, value);
            }
            response
        }
    };
    let headers = response.headers_mut();
    for (name, value) in [
        (header::X_CONTENT_TYPE_OPTIONS, "nosniff"),
        (header::X_FRAME_OPTIONS, "DENY"),
        (header::REFERRER_POLICY, "no-referrer"),
        (HeaderName::from_static("cross-origin-resource-policy"), "same-origin"),
    ] {
        headers.insert(name, HeaderValue::from_static(value));
    }
    headers.entry(header::CACHE_CONTROL).or_insert(HeaderValue::from_static("no-store"));
    response
}

#[cfg(test)]
mod tests {
    use super::*;

    fn guard(listen: &str, hosts: &[&str]) -> Guard {
        let hosts = hosts.iter().map(|&host| host.to_owned()).collect();
        Guard { listen: listen.parse().expect("an address"), hosts, keys: None }
    }

    #[test]
    fn hosts_are_loopback_or_listed() {
        let local = guard("127.0.0.1:8000", &["shelf.example"]);
        for host in
            ["localhost", "LOCALHOST", "127.0.0.1", "[::1]", "127.9.9.9", "shelf.example", "localhost."]
        {
            assert!(local.knows_host(host), "{host}");
        }
        for host in
            ["evil.example", "localhost.evil.example", "192.168.1.5", "", "127.0.0.1.evil.example", "0.0.0.0"]
        {
            assert!(!local.knows_host(host), "{host}");
        }
        let open = guard("0.0.0.0:8000", &[]);
        assert!(open.knows_host("192.168.1.5") && !open.knows_host("evil.example"));
    }

    #[test]
    fn a_host_header_must_be_there_once() {
        let local = guard("127.0.0.1:8000", &[]);
        let mut headers = HeaderMap::new();
        assert!(local.check_host(&headers, None).is_err());
        headers.append(header::HOST, HeaderValue::from_static("localhost:8000"));
        assert!(local.check_host(&headers, None).is_ok());
        assert!(local.check_host(&headers, Some(&Authority::from_static("evil.example"))).is_err());
        headers.append(header::HOST, HeaderValue::from_static("localhost:8000"));
        assert!(local.check_host(&headers, None).is_err());
    }

    #[test]
    fn origins_must_be_the_servers_own() {
        let check = |origin: Option<&'static str>, site: Option<&'static str>| {
            let mut headers = HeaderMap::new();
            headers.insert(header::HOST, HeaderValue::from_static("localhost:8000"));
            if let Some(origin) = origin {
                headers.insert(header::ORIGIN, HeaderValue::from_static(origin));
            }
            if let Some(site) = site {
                headers.insert("sec-fetch-site", HeaderValue::from_static(site));
            }
            Guard::check_origin(&headers).is_ok()
        };
        assert!(
            check(None, None)
                && check(Some("http://localhost:8000"), None)
                && check(None, Some("same-origin"))
        );
        for origin in
            ["null", "http://evil.example", "http://localhost:9000", "http://localhost", "localhost:8000"]
        {
            assert!(!check(Some(origin), None), "{origin}");
        }
        assert!(!check(None, Some("cross-site")) && !check(None, Some("same-site")));
    }
}
