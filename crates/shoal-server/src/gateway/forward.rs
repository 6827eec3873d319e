//! A request under `/v1`: find its model, wait for it, pass it on, pass the answer back.
//!
//! **Waiting.** A stream that waits longer than [`Settings::grace`](super::Settings) begins early with comments, so that
//! no client or proxy gives up on a silent connection; until then, and for everything that is not a stream, the status
//! is still open and errors have their own.
//!
//! **Retrying.** A worker that cannot be reached was never asked: the request is routed again, a few times, with pauses
//! (the shelf may not have noticed yet). A worker that took the request and died before its first byte is replaced once.

use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::body::Body;
use axum::extract::{Request, State};
use axum::http::{HeaderMap, HeaderName, HeaderValue, Method, StatusCode, header, request};
use axum::response::{IntoResponse, Response};
use bytes::Bytes;
use http_body_util::{BodyExt, Full, Limited};

use super::App;
use super::ask::{Ask, read_body};
use super::error::{ApiError, ErrorBody};
use super::passing::{Journey, Passing};
use super::salts::CACHE_SALT;
use super::upstream::UpstreamError;
use crate::shelf::{Caller, Route};

const WAIT_MS: HeaderName = HeaderName::from_static("x-shoal-wait-ms");
const WAS_ASLEEP: HeaderName = HeaderName::from_static("x-shoal-was-asleep");
const CONNECT_TRIES_MAX: u32 = 6;
const CONNECT_PAUSE: Duration = Duration::from_millis(50);
const ERROR_BODY_BYTES_MAX: usize = 64 << 10;
const BODY_WAIT_MAX: Duration = Duration::from_mins(2);

/// Headers that belong to one connection, not to the request; and those that are ours alone: the key, and what we say to
/// workers.
const DROPPED: [HeaderName; 13] = [
    header::CONNECTION,
    header::PROXY_AUTHENTICATE,
    header::PROXY_AUTHORIZATION,
    header::TE,
    header::TRAILER,
    header::TRANSFER_ENCODING,
    header::UPGRADE,
    header::HOST,
    header::EXPECT,
    header::AUTHORIZATION,
    header::COOKIE,
    CACHE_SALT,
    HeaderName::from_static("keep-alive"),
];

/// Everything under `/v1` that the gateway does not answer itself.
pub(crate) async fn forward(State(app): State<Arc<App>>, request: Request) -> Response {
    let asked = Instant::now();
    let (head, body) = request.into_parts();
    let caller = head.extensions.get::<Caller>().cloned().unwrap_or_default();
    if head.method != Method::POST {
        let message =
            format!("there is no {} {}; requests for a model are POSTs", head.method, head.uri.path());
        return ApiError::new(StatusCode::NOT_FOUND, "unknown_url", message).into_response();
    }
    let read = tokio::time::timeout(BODY_WAIT_MAX, read_body(body, app.limits.request_bytes_max)).await;
    let body = match read {
        Ok(Ok(body)) => body,
        Ok(Err(error)) => return app.refused(None, &caller, error),
        Err(_) => {
            let error = ApiError::new(
                StatusCode::REQUEST_TIMEOUT,
                "incomplete_body",
                "the body did not arrive in time",
            );
            return app.refused(None, &caller, error);
        }
    };
    let ask = match Ask::read(&body) {
        Ok(ask) => ask,
        Err(error) => return app.refused(None, &caller, error),
    };
    // Before it is waited for: a bad request wakes nobody. Who is unknown is told of that first.
    let is_strict = app.models.is_strict(&ask.model);
    if is_strict && let Err(error) = ask.check(head.uri.path()) {
        return app.refused(Some(&ask.model), &caller, error);
    }
    // What a program of others makes of a header is not known.
    let salt = app.salts.as_ref().filter(|_| is_strict).map(|salts| salts.of(&caller));
    let deadline = asked + app.limits.wait_max;
    let errand = Errand { app, head, body, ask, asked, deadline, caller, salt };
    if errand.ask.stream { errand.answer_stream().await } else { errand.answer().await }
}

/// One request, whole.
#[derive(Debug)]
struct Errand {
    app: Arc<App>,
    head: request::Parts,
    body: Bytes,
    ask: Ask,
    asked: Instant,
    deadline: Instant,
    caller: Caller,
    salt: Option<HeaderValue>,
}

impl Errand {
    async fn route(&self) -> Result<Route, ApiError> {
        Ok(self.app.models.route(&self.ask.model, &self.caller, self.deadline).await?)
    }

    async fn answer(self) -> Response {
        let answer = match self.route().await {
            Ok(route) => self.pass(route).await,
            Err(error) => Err(error),
        };
        self.settle(answer)
    }

    async fn answer_stream(self) -> Response {
        let errand = Arc::new(self);
        let mut waiting = {
            let errand = Arc::clone(&errand);
            Box::pin(async move { errand.route().await })
        };
        match tokio::time::timeout(errand.app.settings.grace, &mut waiting).await {
            Ok(Ok(route)) => {
                let answer = errand.pass(route).await;
                errand.settle(answer)
            }
            Ok(Err(error)) => errand.settle(Err(error)),
            Err(_) => {
                let answer = {
                    let errand = Arc::clone(&errand);
                    Box::pin(async move {
                        let route = waiting.await?;
                        errand.pass(route).await
                    })
                };
                begin_early(errand, answer)
            }
        }
    }

    /// Counts the answer and gives it a form.
    fn settle(&self, answer: Result<Response, ApiError>) -> Response {
        match answer {
            Ok(response) => {
                self.app.metrics.request(&self.ask.model, &self.caller, response.status());
                response
            }
            Err(error) => self.app.refused(Some(&self.ask.model), &self.caller, error),
        }
    }

    /// Sends the request along `route`; comes back with the head of an answer whose body is still on its way.
    async fn pass(&self, mut route: Route) -> Result<Response, ApiError> {
        let mut connect_tries = 0;
        let mut lost_before = false;
        let super::Settings { silence_max, silence_told_every, .. } = self.app.settings;
        loop {
            let was_asleep = route.was_asleep();
            let waited = route.waited();
            let sending = self.app.lanes.send(route.target(), || self.request(), silence_max);
            let sent = told_of(&route, silence_told_every, sending).await;
            let why = match sent {
                Ok((response, lane)) => {
                    let (head, frames) = response.into_parts();
                    let is_event_stream = is_event_stream(&head.headers);
                    let journey = Journey {
                        model: self.ask.model.clone(),
                        route,
                        asked: self.asked,
                        is_answer: head.status.is_success(),
                        app: Arc::clone(&self.app),
                    };
                    let mut body = Passing::new(frames, lane, journey, is_event_stream);
                    match body.first_frame().await {
                        Ok(()) => {
                            let mut response = Response::new(Body::new(body));
                            *response.status_mut() = head.status;
                            *response.headers_mut() = passed_headers(&head.headers);
                            tell_wait(response.headers_mut(), waited, was_asleep);
                            return Ok(response);
                        }
                        Err(error) => {
                            drop(body);
                            if std::mem::replace(&mut lost_before, true) || self.is_late() {
                                return Err(self.app.lost(&self.ask.model, &error));
                            }
                            error
                        }
                    }
                }
                Err(error @ UpstreamError::Silent(_)) => {
                    let message = format!("model {:?}: {error}", self.ask.model);
                    return Err(ApiError::new(StatusCode::GATEWAY_TIMEOUT, "worker_silent", message));
                }
                Err(error @ UpstreamError::Connect(_)) => {
                    drop(route);
                    connect_tries += 1;
                    if connect_tries == CONNECT_TRIES_MAX || self.is_late() {
                        return Err(self.app.lost(&self.ask.model, &error));
                    }
                    error.to_string()
                }
                Err(error @ UpstreamError::Lost(_)) => {
                    drop(route);
                    if std::mem::replace(&mut lost_before, true) || self.is_late() {
                        return Err(self.app.lost(&self.ask.model, &error));
                    }
                    error.to_string()
                }
            };
            tracing::warn!(model = self.ask.model, %why, "a worker did not answer; asking again");
            tokio::time::sleep(CONNECT_PAUSE * (1 << connect_tries)).await;
            route = self.route().await?;
        }
    }

    /// There is no time left in which another worker could be waited for: what became of this one says more.
    fn is_late(&self) -> bool {
        Instant::now() >= self.deadline
    }

    fn request(&self) -> axum::http::Request<Full<Bytes>> {
        let mut request = axum::http::Request::new(Full::new(self.body.clone()));
        *request.method_mut() = self.head.method.clone();
        // Origin form: the socket is the host.
        if let Some(target) = self.head.uri.path_and_query() {
            *request.uri_mut() = target.clone().into();
        }
        *request.headers_mut() = passed_headers(&self.head.headers);
        request.headers_mut().remove(header::CONTENT_LENGTH);
        request.headers_mut().insert(header::HOST, HeaderValue::from_static("shoal"));
        if let Some(salt) = &self.salt {
            request.headers_mut().insert(CACHE_SALT, salt.clone());
        }
        request
    }
}

/// Waits for what comes of a worker, and says now and then that nothing has come yet.
pub(super) async fn told_of<T>(route: &Route, every: Duration, coming: impl Future<Output = T>) -> T {
    let began = Instant::now();
    tokio::pin!(coming);
    loop {
        match tokio::time::timeout(every, &mut coming).await {
            Ok(came) => return came,
            Err(_) => route.no_byte(began.elapsed()),
        }
    }
}

type Answering = std::pin::Pin<Box<dyn Future<Output = Result<Response, ApiError>> + Send>>;

enum Stage {
    Waiting(Answering),
    Passing(Body),
    Over,
}

/// The status is 200 from here on; what goes wrong becomes an event.
fn begin_early(errand: Arc<Errand>, answer: Answering) -> Response {
    // As far as can be said before the wait is over: an awake model's request waits for its turn.
    let was_asleep = !errand.app.models.is_awake(&errand.ask.model);
    let mut pause = Duration::ZERO;
    let stream = futures_util::stream::unfold(Stage::Waiting(answer), move |stage| {
        let errand = Arc::clone(&errand);
        let pause_now = std::mem::replace(&mut pause, errand.app.settings.comment_every);
        async move { next_bytes(stage, &errand, pause_now).await }
    });
    let mut response = Response::new(Body::from_stream(stream));
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("text/event-stream; charset=utf-8"));
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-cache"));
    headers.insert(WAS_ASLEEP, HeaderValue::from_static(if was_asleep { "true" } else { "false" }));
    response
}

/// What a client that waits may see meanwhile: never a part of the answer, and for a program nothing at all.
fn comment(errand: &Errand) -> Bytes {
    let model = &errand.ask.model;
    let how =
        errand.app.models.progress(model, &errand.caller).map_or_else(String::new, |how| format!(" ({how})"));
    // One line: a worker's own words may be in it.
    let how: String = how.chars().filter(|c| !c.is_control()).collect();
    Bytes::from(format!(": waiting for {}{how}\n\n", model.escape_default()))
}

async fn next_bytes(
    stage: Stage,
    errand: &Errand,
    pause: Duration,
) -> Option<(Result<Bytes, axum::Error>, Stage)> {
    let mut body = match stage {
        Stage::Over => return None,
        Stage::Passing(body) => body,
        Stage::Waiting(mut answer) => match tokio::time::timeout(pause, &mut answer).await {
            Err(_) => return Some((Ok(comment(errand)), Stage::Waiting(answer))),
            Ok(Err(error)) => {
                errand.app.metrics.request(&errand.ask.model, &errand.caller, error.status);
                return Some((Ok(error.sse().into()), Stage::Over));
            }
            Ok(Ok(response)) => {
                errand.app.metrics.request(&errand.ask.model, &errand.caller, response.status());
                if !response.status().is_success() || !is_event_stream(response.headers()) {
                    return Some((Ok(late_error(response).await.into()), Stage::Over));
                }
                response.into_body()
            }
        },
    };
    loop {
        match body.frame().await? {
            Ok(frame) => {
                if let Ok(data) = frame.into_data() {
                    return Some((Ok(data), Stage::Passing(body)));
                }
            }
            Err(error) => return Some((Err(error), Stage::Over)),
        }
    }
}

/// An error response of the worker as an event: its own words where it used the usual form.
async fn late_error(response: Response) -> String {
    let status = response.status();
    let body = Limited::new(response.into_body(), ERROR_BODY_BYTES_MAX).collect().await;
    let body = body.map(http_body_util::Collected::to_bytes).unwrap_or_default();
    if let Ok(body) = serde_json::from_slice::<ErrorBody>(&body) {
        return format!("data: {}\n\n", serde_json::to_string(&body).unwrap_or_default());
    }
    let message = format!("the worker answered {status} and no stream");
    ApiError::new(StatusCode::BAD_GATEWAY, "worker_error", message).sse()
}

fn is_event_stream(headers: &HeaderMap) -> bool {
    let content_type = headers.get(header::CONTENT_TYPE).and_then(|value| value.to_str().ok());
    content_type.is_some_and(|value| value.trim_start().to_ascii_lowercase().starts_with("text/event-stream"))
}

/// All headers but those of one connection, among them the ones that `Connection` names.
fn passed_headers(headers: &HeaderMap) -> HeaderMap {
    let named = headers.get_all(header::CONNECTION).iter().filter_map(|value| value.to_str().ok());
    let named: Vec<String> =
        named.flat_map(|value| value.split(',')).map(|name| name.trim().to_ascii_lowercase()).collect();
    headers
        .iter()
        .filter(|(name, _)| !DROPPED.contains(name) && !named.iter().any(|named| named == name.as_str()))
        .map(|(name, value)| (name.clone(), value.clone()))
        .collect()
}

fn tell_wait(headers: &mut HeaderMap, waited: Duration, was_asleep: bool) {
    headers.insert(WAIT_MS, HeaderValue::from(u64::try_from(waited.as_millis()).unwrap_or(u64::MAX)));
    headers.insert(WAS_ASLEEP, HeaderValue::from_static(if was_asleep { "true" } else { "false" }));
}
