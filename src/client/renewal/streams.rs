//! The streams of renewals of one client.

use std::collections::HashMap;
use std::future::{Future as _, poll_fn};
use std::pin::Pin;
use std::sync::{Arc, Weak};
use std::task::Poll;
use std::time::Duration;

use parking_lot::Mutex;
use tokio::sync::oneshot;
use tokio::time::{Instant, sleep_until};

use super::pace::Pace;
use super::plan::{self, Candidate, Step, next_step};
use super::standing::Standing;
use super::stream::{EndCause, LeaseStream, Renewed, StreamEnd};
use crate::balance::AttemptRecord;
use crate::client::etcd_error::EtcdError;
use crate::client::handle::Client;
use crate::client::transport::CallOptions;
use crate::error::{Error, Result};

/// How many tokens one renewal may ask for. Checking a password costs etcd tens of milliseconds of
/// processor time, and a token that is refused time and again will not be accepted.
const MAX_TOKENS: u32 = 3;

/// How many steps a renewal takes before it waits. Usually it takes one.
const MAX_STEPS: usize = 10;

/// The most open streams per member.
const MAX_STREAMS: usize = 2;

/// The streams on which a client renews its leases: one per member, and a further one while that is
/// silent.
#[derive(Debug)]
pub(in crate::client) struct LeaseStreams {
    client: Client,
    members: Mutex<Members>,
}

/// The streams to the members of the cluster, and how each member responds.
#[derive(Debug, Default)]
struct Members {
    /// In the order in which they were opened.
    streams: Vec<Arc<LeaseStream>>,
    standings: HashMap<Arc<str>, Standing>,
    /// The standing of a stream that was sent to no member.
    of_none: Standing,
}

/// A renewal that was sent on a stream and has no response yet.
struct Asked {
    stream: Arc<LeaseStream>,
    at: Instant,
    response: oneshot::Receiver<Renewed>,
    is_recorded: bool,
}

impl Asked {
    /// Records where the renewal was sent, once that is known.
    fn begin(&mut self, record: &AttemptRecord) {
        if !self.is_recorded
            && let Some(member) = self.stream.member()
        {
            record.begin(&member);
            self.is_recorded = true;
        }
    }
}

/// The streams of a client, while there is a handle to them.
#[derive(Default)]
struct SharedStreams(Mutex<Weak<LeaseStreams>>);

impl LeaseStreams {
    /// The streams of a client, which all its leases share. They end with the last handle.
    pub(in crate::client) fn of(client: &Client) -> Arc<Self> {
        let shared = client.extension::<SharedStreams>();
        let mut streams = shared.0.lock();
        streams.upgrade().unwrap_or_else(|| {
            let new = Arc::new(Self {
                client: client.clone(),
                members: Mutex::default(),
            });
            *streams = Arc::downgrade(&new);
            new
        })
    }

    /// Renews a lease, however long that takes.
    ///
    /// Fails with [`Error::LeaseNotFound`] if a member responds so, with [`Error::RuntimeEnded`],
    /// and with the error of a member that refuses the user or the request. Dropping the future
    /// leaves the streams open.
    pub(in crate::client) async fn renew(&self, id: i64, pace: Pace) -> Result<Renewed> {
        let record = CallOptions::current().record.unwrap_or_default();
        let mut asked = Vec::new();
        // How many tokens were asked for.
        let mut tokens = 0;
        loop {
            if self.client.has_runtime_ended() {
                return Err(self.client.runtime_error(operation(id)));
            }
            let wake_at = self.ask(id, pace, &mut asked);
            asked.iter_mut().for_each(|asked| asked.begin(&record));
            let woken = tokio::select! {
                biased;
                ended = next_response(&mut asked) => Some(ended),
                () = sleep_until_some(wake_at) => None,
            };
            match woken {
                Some((stream, Some(renewed))) => {
                    stream.record_success(&record);
                    self.on_response(&stream, pace, &asked);
                    return match renewed.response.ttl() {
                        1.. => Ok(renewed),
                        _ => Err(Error::LeaseNotFound { id }),
                    };
                }
                Some((stream, None)) => {
                    if let Some(end) = stream.end().filter(|end| end.concerns(id)) {
                        stream.record_end(&end, &record);
                        self.check_end(id, &stream, end, &mut tokens).await?;
                    }
                }
                None => {}
            }
        }
    }

    /// Sends the renewal to the members that are due. Returns when the next one is.
    fn ask(&self, id: i64, pace: Pace, asked: &mut Vec<Asked>) -> Option<Instant> {
        let now = Instant::now();
        let ready = self.client.inner.transport.rpc.ready_members();
        let mut members = self.members.lock();
        // A stream may end at any time, also at once after the end of its runtime.
        for _ in 0..MAX_STEPS {
            members.update(&ready, now);
            let known = members.known(&ready);
            let candidates: Vec<_> = known
                .iter()
                .map(|known| members.candidate(known, asked))
                .collect();
            let step = next_step(pace, now, &candidates);
            let stream = match &step {
                Step::Wait(until) => return *until,
                Step::Send(index) => known[*index].stream.clone(),
                Step::Open(indices) => Some(self.open(&mut members, &known, indices)),
                Step::Reopen(index) => {
                    if let Some(member) = &known[*index].member {
                        members.standing(member).on_silent();
                        members.close_oldest(member, MAX_STREAMS - 1);
                    }
                    Some(self.open(&mut members, &known, &[*index]))
                }
            };
            let sent = stream.and_then(|stream| Some((stream.renew(id, now)?, stream)));
            // A stream that has just ended or is full sends nothing, and another step follows.
            if let Some((response, stream)) = sent {
                asked.push(Asked {
                    stream,
                    at: now,
                    response,
                    is_recorded: false,
                });
            }
        }
        Some(now + pace.hedge_after(Duration::ZERO))
    }

    fn open(&self, members: &mut Members, known: &[Known], wanted: &[usize]) -> Arc<LeaseStream> {
        let avoided = known
            .iter()
            .enumerate()
            .filter(|(n, _)| !wanted.contains(n));
        let avoided = avoided.filter_map(|(_, known)| known.member.clone());
        let rpc = &self.client.inner.transport.rpc;
        let stream = Arc::new(LeaseStream::open(rpc.clone(), rpc.runtime(), avoided));
        members.streams.push(Arc::clone(&stream));
        stream
    }

    /// Handles a response. Streams that stay silent while another member responds are stuck, and
    /// are closed so that no other lease waits for them.
    fn on_response(&self, responding: &Arc<LeaseStream>, pace: Pace, asked: &[Asked]) {
        let now = Instant::now();
        let mut members = self.members.lock();
        members.learn_responses();
        let round_trip_of = |members: &Members, stream: &LeaseStream| {
            let standing = stream.member().and_then(|m| members.standings.get(&m));
            standing.map_or(Duration::ZERO, Standing::round_trip)
        };
        members.of_none = Standing::default();
        let of_responding = round_trip_of(&members, responding);
        for Asked { stream, .. } in asked {
            let round_trip = round_trip_of(&members, stream).max(of_responding);
            if stream.silence(now) >= pace.close_after(round_trip) {
                members.close_silent(stream, now);
            }
        }
    }

    /// Handles the end of a stream that a renewal waited on. Fails if another stream would end in
    /// the same way.
    async fn check_end(
        &self,
        id: i64,
        stream: &LeaseStream,
        end: StreamEnd,
        tokens: &mut u32,
    ) -> Result<()> {
        let is_of_one_lease = end.is_of_one_lease();
        let EndCause::Status(status) = end.cause else {
            return Ok(());
        };
        tracing::debug!(%status, member = ?stream.member(), "a stream of renewals has ended");
        let error = Error::from_etcd(operation(id), etcd_client::Error::GRpcStatus(*status));
        match EtcdError::of(&error) {
            // Members learn of a new token one after another, so the refusal may pass.
            EtcdError::InvalidToken if self.client.inner.transport.rpc.token().is_new() => Ok(()),
            EtcdError::InvalidToken if *tokens >= MAX_TOKENS => Err(error),
            EtcdError::InvalidToken => {
                *tokens += 1;
                self.renew_token(stream, error).await
            }
            // A change of a user or role invalidates all earlier tokens, even new ones. Many changes
            // may follow one another, so only the TTL limits the number of tokens.
            EtcdError::OldToken => self.renew_token(stream, error).await,
            EtcdError::Learner => Ok(()),
            EtcdError::PermissionDenied if is_of_one_lease => Err(error),
            _ if end.is_fresh && error.is_permanent() => Err(error),
            _ => Ok(()),
        }
    }

    /// Renews the user's token, once for all renewals on the stream that was refused.
    async fn renew_token(&self, stream: &LeaseStream, refused: Error) -> Result<()> {
        let transport = &self.client.inner.transport;
        if self.client.inner.config.username.is_none() {
            return Err(refused);
        }
        let renewing = transport.raw.refresh_token();
        let renewed = transport
            .rpc
            .renew_token(stream.opened_at(), renewing)
            .await;
        match renewed.map_err(|error| Error::from_etcd("renew the user's token", error)) {
            Err(error) if error.is_permanent() => Err(error),
            Err(error) => {
                tracing::debug!(%error, "cannot renew the user's token");
                Ok(())
            }
            Ok(()) => Ok(()),
        }
    }
}

/// A member, or a stream that was not sent to a member yet.
struct Known {
    member: Option<Arc<str>>,
    stream: Option<Arc<LeaseStream>>,
}

impl Members {
    /// Forgets the streams that have ended, and the members that are neither connected nor have a
    /// stream. A connected stream may stay open after its member was removed from the channel, so
    /// it is closed when it owes no response.
    fn update(&mut self, ready: &[Arc<str>], now: Instant) {
        self.learn_responses();
        let ended: Vec<_> = self
            .streams
            .extract_if(.., |stream| stream.end().is_some())
            .collect();
        for stream in ended {
            let Some(end) = stream.end() else {
                continue;
            };
            let is_failure = matches!(end.cause, EndCause::Status(_));
            if end.is_fresh && is_failure && !end.is_of_one_lease() {
                match stream.member() {
                    Some(member) => self.standing(&member).on_refused(now),
                    None => self.of_none.on_refused(now),
                }
            }
        }
        let streams = self.streams.iter();
        let unused: Vec<_> = streams
            .filter(|s| s.is_left(ready) && s.to_plan() == plan::Stream::Idle)
            .cloned()
            .collect();
        for stream in unused {
            self.close(&stream);
        }
        for member in ready {
            self.standing(member);
        }
        if self.standings.len() > ready.len() + self.streams.len() {
            let open: Vec<_> = self.streams.iter().filter_map(|s| s.member()).collect();
            self.standings
                .retain(|member, _| ready.contains(member) || open.contains(member));
        }
    }

    /// Records the members' responses. Of two streams to one member, the one that has responded
    /// since both were open is kept.
    fn learn_responses(&mut self) {
        for stream in self.streams.clone() {
            let (Some(member), Some(last)) = (stream.member(), stream.last_response()) else {
                continue;
            };
            self.standing(&member).on_response(last);
            let is_double = |other: &&Arc<LeaseStream>| {
                !Arc::ptr_eq(other, &stream)
                    && other.member().as_ref() == Some(&member)
                    && other.opened_at() < last.at
                    && other.last_response().is_none_or(|other| other.at < last.at)
            };
            let doubles: Vec<_> = self.streams.iter().filter(is_double).cloned().collect();
            for double in doubles {
                self.close(&double);
            }
        }
        let members: Vec<_> = self.streams.iter().filter_map(|s| s.member()).collect();
        for member in members {
            self.close_oldest(&member, MAX_STREAMS);
        }
    }

    /// The members that can be asked, with their newest streams. Without any, a placeholder for the
    /// first member that connects.
    fn known(&self, ready: &[Arc<str>]) -> Vec<Known> {
        let mut known = Vec::<Known>::new();
        for stream in self.streams.iter().rev().filter(|s| !s.is_left(ready)) {
            let member = stream.member();
            if member.is_none() || !known.iter().any(|k| k.member == member) {
                known.push(Known {
                    member,
                    stream: Some(Arc::clone(stream)),
                });
            }
        }
        for member in ready {
            if !known.iter().any(|k| k.member.as_ref() == Some(member)) {
                known.push(Known {
                    member: Some(Arc::clone(member)),
                    stream: None,
                });
            }
        }
        if known.is_empty() {
            known.push(Known {
                member: None,
                stream: None,
            });
        }
        known
    }

    fn candidate(&self, known: &Known, asked: &[Asked]) -> Candidate<'_> {
        let is_stream = |asked: &&Asked| {
            let stream = known.stream.as_ref();
            stream.is_some_and(|stream| Arc::ptr_eq(stream, &asked.stream))
        };
        let member = known.member.as_ref();
        let standing = member.and_then(|member| self.standings.get(member));
        Candidate {
            standing: standing.unwrap_or(&self.of_none),
            stream: known
                .stream
                .as_ref()
                .map_or(plan::Stream::None, |stream| stream.to_plan()),
            asked_at: asked.iter().find(is_stream).map(|asked| asked.at),
        }
    }

    fn standing(&mut self, member: &Arc<str>) -> &mut Standing {
        self.standings.entry(Arc::clone(member)).or_default()
    }

    /// Closes the oldest streams to a member, so that `kept` are left.
    fn close_oldest(&mut self, member: &Arc<str>, kept: usize) {
        let of_member = self.streams.iter();
        let of_member = of_member
            .filter(|stream| stream.member().as_ref() == Some(member) && stream.end().is_none());
        let oldest: Vec<_> = of_member.rev().skip(kept).cloned().collect();
        for stream in oldest {
            self.close(&stream);
        }
    }

    fn close_silent(&mut self, stream: &Arc<LeaseStream>, now: Instant) {
        let silence = stream.silence(now);
        if let Some(member) = stream.member() {
            tracing::debug!(%member, ?silence, "closing a silent stream of renewals");
            self.standing(&member).on_silent();
        }
        self.close(stream);
    }

    fn close(&mut self, stream: &Arc<LeaseStream>) {
        stream.close();
        self.streams.retain(|other| !Arc::ptr_eq(other, stream));
    }
}

/// The next response to one of the renewals, or `None` with a stream that has ended. Pending
/// without any renewal.
async fn next_response(asked: &mut Vec<Asked>) -> (Arc<LeaseStream>, Option<Renewed>) {
    poll_fn(|cx| {
        for index in 0..asked.len() {
            if let Poll::Ready(response) = Pin::new(&mut asked[index].response).poll(cx) {
                return Poll::Ready((asked.swap_remove(index).stream, response.ok()));
            }
        }
        Poll::Pending
    })
    .await
}

async fn sleep_until_some(at: Option<Instant>) {
    match at {
        Some(at) => sleep_until(at).await,
        None => std::future::pending().await,
    }
}

pub(in crate::client) fn operation(id: i64) -> String {
    format!("keep lease {id:x} alive")
}
